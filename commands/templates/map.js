// A map of cells on a canvas. `props.value` is what `commands/cell_map.py` draws:
// {x, y: 0..1000, color: index into palette, palette: CSS colours, legend: [[text, colour, index or null]], title,
// marks: {x, y}, rows: the selected cells}.
// A loop drawn with mouse or finger selects cells, and so does a type of the legend, which a keyboard reaches: the event
// `select` carries their rows. A click beside a loop, and a second one on a type, select none.
// The page may replace what is in `element` with each value, so parts are looked up, and `element` itself listens.
const part = (name) => element.querySelector(name), MARGIN = 10;
let chosen = null, order = [], loop = [];

const place = (value, length) => MARGIN + (value / 1000) * (length - 2 * MARGIN);
const cells = () => (props.value && props.value.x ? props.value : null);

function inside(x, y) { // ray casting
  let odd = false;
  for (let i = 0, j = loop.length - 1; i < loop.length; j = i++) {
    const [ax, ay] = loop[i], [bx, by] = loop[j];
    if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) odd = !odd;
  }
  return odd;
}

function choose(rows) {
  const drawn = cells();
  chosen = rows.length ? new Set(rows) : null;
  const above = (i) => drawn.color[i] + (chosen !== null && chosen.has(i) ? drawn.palette.length : 0);
  order = drawn ? [...drawn.x.keys()].sort((a, b) => above(a) - above(b)) : [];
  part("canvas").ariaLabel = drawn ? `Map of the cells. ${drawn.title}` : "Map of the cells";
  draw();
}

function select(rows) {
  choose(rows);
  trigger("select", { rows });
}

function draw() {
  const canvas = part("canvas"), context = canvas.getContext("2d"), scale = window.devicePixelRatio || 1;
  const drawn = cells(), width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * scale;
  canvas.height = height * scale;
  context.scale(scale, scale);
  if (!drawn) return;
  const radius = Math.max(1.2, Math.min(4, 90 / Math.sqrt(drawn.x.length)));
  const areNumbers = drawn.legend.length > 0 && drawn.legend[0][2] === null; // to compare with those of other cells
  context.strokeStyle = "#d9480f";
  for (const i of order) {
    const isChosen = chosen !== null && chosen.has(i);
    context.globalAlpha = chosen === null || isChosen || areNumbers ? 0.85 : 0.08;
    context.fillStyle = drawn.palette[drawn.color[i]];
    context.beginPath();
    context.arc(place(drawn.x[i], width), place(1000 - drawn.y[i], height), radius, 0, 7);
    context.fill();
    if (areNumbers && isChosen) context.stroke();
  }
  context.globalAlpha = 1;
  for (const [stroke, width] of [["#fff", 4], ["#111", 1.5]]) { // generated cells: crosses, with a rim
    context.strokeStyle = stroke;
    context.lineWidth = width;
    context.beginPath();
    for (let i = 0; i < drawn.marks.x.length; i++) {
      const x = place(drawn.marks.x[i], canvas.clientWidth), y = place(1000 - drawn.marks.y[i], height);
      context.moveTo(x - 3, y - 3); context.lineTo(x + 3, y + 3);
      context.moveTo(x - 3, y + 3); context.lineTo(x + 3, y - 3);
    }
    context.stroke();
  }
  if (loop.length > 1) {
    context.strokeStyle = "#555";
    context.beginPath();
    loop.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.closePath();
    context.stroke();
  }
}

function entry([text, colour, index]) {
  const item = document.createElement("li"), dot = document.createElement("i");
  dot.style.background = colour;
  if (index === null) {
    item.append(dot, text); // as text: a label of a file is no HTML
    return item;
  }
  const button = document.createElement("button"), drawn = cells();
  const mine = [...drawn.x.keys()].filter((i) => drawn.color[i] === index);
  const isChosen = () => chosen !== null && chosen.size === mine.length && mine.every((i) => chosen.has(i));
  button.title = "Select these cells";
  button.ariaPressed = drawn.rows.length === mine.length && mine.every((i, k) => drawn.rows[k] === i);
  button.append(dot, text);
  button.addEventListener("click", () => select(isChosen() ? [] : mine));
  item.append(button);
  return item;
}

function renew() {
  const drawn = cells();
  loop = [];
  part("p").textContent = drawn ? drawn.title : "No cells yet.";
  part("ul").replaceChildren(...(drawn ? drawn.legend : []).map(entry));
  choose(drawn ? drawn.rows : []);
}

const at = (event) => {
  const box = part("canvas").getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};
element.addEventListener("pointerdown", (event) => {
  if (event.target !== part("canvas")) return;
  event.target.setPointerCapture(event.pointerId);
  loop = [at(event)];
});
element.addEventListener("pointermove", (event) => {
  if (!loop.length) return;
  loop.push(at(event));
  draw();
});
element.addEventListener("pointerup", () => {
  if (!loop.length) return;
  const { clientWidth: width, clientHeight: height } = part("canvas"), drawn = cells(), rows = [];
  if (drawn && loop.length > 2) {
    for (let i = 0; i < drawn.x.length; i++)
      if (inside(place(drawn.x[i], width), place(1000 - drawn.y[i], height))) rows.push(i);
  }
  loop = [];
  if (drawn) select(rows);
  else draw();
});
new ResizeObserver(draw).observe(element);
watch("value", renew);
renew();
