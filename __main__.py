"""The `scmmgpt` command: it parses arguments, calls the pipeline once, and writes a file.

    scmmgpt annotate cells.h5ad --model CHECKPOINT --output annotated.h5ad
    scmmgpt generate "a B cell from blood" --model CHECKPOINT --output generated.h5ad

Outputs are checked before the work: colliding paths, folders without space, annotations that `.h5ad` cannot store. For
an input that cannot be used, a command prints one line on stderr, exits with code 2, and leaves no half-written file;
see `errors`. Commands import heavy libraries inside functions, so that `--help` is instant.
"""

import sys


try:
    import argparse
    import logging
    import os
    from collections.abc import Callable
    from pathlib import Path
    from typing import TYPE_CHECKING, Any

    from scmmgpt.commands.errors import (
        STOPPED,
        OneLineParser,
        PrintCompletion,
        PrintVersion,
        explain,
        reworded,
        run_command,
        write_error,
    )
    from scmmgpt.commands.files import check_file, check_folder, check_paths, exists, whole_file
    from scmmgpt.commands.garbage import started, starting
    from scmmgpt.commands.options import (
        READ_HELP,
        add_annotation,
        add_audit,
        add_chat,
        add_description,
        add_generation,
        add_index,
        add_input,
        add_inspection,
        add_mcp,
        add_output,
        add_partitions,
        add_plan,
        add_report,
        add_search,
        add_verify,
    )
    from scmmgpt.commands.outputs import check_outputs, finish, several_outputs, write
    from scmmgpt.commands.progress import log_if_slow
    from scmmgpt.commands.sources import Source, check_split, read_adata
    from scmmgpt.commands.storage import run_staged
    from scmmgpt.readers.label_lists import read_text, read_words
except KeyboardInterrupt:  # `run_command` reports later interrupts
    sys.stderr.write("scmmgpt: stopped.\n")
    sys.exit(130)


if TYPE_CHECKING:
    import anndata

    from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline

Args = argparse.Namespace

IN_PARTITIONS = ("annotate", "audit", "embed", "search")  # commands that workers can compute in partitions
ERROR, INCOMPLETE = 2, 3  # exit codes: nothing was written; some cells have no result
# Commands of `python -m scmmgpt.train` whose names are not commands of `scmmgpt`.
TRAINING = ("prepare", "cache", "convert", "pretrain", "align", "tune", "reinforce", "finetune", "release", "options")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    try:
        return run_staged("scmmgpt", sys.argv[1:] if argv is None else argv, run_words)
    except KeyboardInterrupt:  # before the command is known
        sys.stderr.write("scmmgpt: stopped.\n")
        return STOPPED


def run_words(argv: list[str]) -> int:
    """Run a command line after staging, with paths of this machine, and return the exit status."""
    parser = make_parser()
    if argv and argv[0] in TRAINING:
        parser.error(f"{argv[0]!r} is a command of training: `python -m scmmgpt.train {argv[0]} --help`")
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    file = getattr(args, "file", None)
    inputs = [*(file if isinstance(file, list) else [file]), getattr(args, "model", None)]
    outputs = [
        path for name in ("output", "table", "evidence", "proof") if (path := getattr(args, name, None)) is not None
    ]

    @starting()
    def work() -> int | None:
        check_split(getattr(args, "given_split", None), [*inputs[:-1], getattr(args, "input", None)])
        if getattr(args, "has_own_model", False):
            choose_model(args)
        if args.command in IN_PARTITIONS and (args.workers or 1) > 1 and args.cluster is None:
            from scmmgpt.commands.cluster import preload_workers

            preload_workers()
        return args.run(args)

    extra = {"report": "eval", "mcp": "mcp"}.get(args.command, "train")
    shown = {"debug": args.debug, "as_json": getattr(args, "json", False)}
    return run_command(f"scmmgpt {args.command}", work, **shown, inputs=inputs, outputs=outputs, extra=extra)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    about = "One language model for single cells and text. `python -m scmmgpt.train finetune` teaches it your labels."
    parser = OneLineParser(prog="scmmgpt", description=about)
    text = "print the completion of a shell, for its start-up file"
    parser.add_argument("--print-completion", choices=("bash", "zsh", "tcsh"), action=PrintCompletion, help=text)
    parser.add_argument("--version", action=PrintVersion, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(run: Callable[[Args], int | None]) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    add_annotation(command(annotate))
    add_audit(command(audit))
    add_chat(command(chat))
    add_description(command(describe))
    sub = command(calibrate)
    add_input(sub, split="validation", writes_model=True)
    sub.add_argument(
        "--label-key", default="cell_type", metavar="COLUMN", help="column with true labels (default: cell_type)"
    )

    sub = command(embed)
    add_input(sub, count="+")
    add_output(sub, table=False)
    add_partitions(sub)
    spaces = "embedding: place among types, space shared with text, or cell model (default: of the checkpoint)"
    sub.add_argument("--of", choices=("profile", "cell-text", "cell"), help=spaces)

    add_index(command(index))
    add_search(command(search))
    add_generation(command(generate))

    add_inspection(command(inspect))
    add_verify(command(verify))
    add_report(command(report))

    add_plan(command(plan))

    sub = command(export)
    sub.add_argument("--model", required=True, metavar="CHECKPOINT", help="folder, or model id on the Hub")
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder to write; a new one")
    sub.add_argument("--json", action="store_true", help="print the paths as JSON")

    sub = command(doctor)
    sub.add_argument("--json", action="store_true", help="print the versions as JSON")

    add_mcp(command(mcp))
    return parser


# -- commands ---------------------------------------------------------------------------------------------------------


def annotate(args: Args) -> int:
    """Name the type of each cell, or choose among your own labels."""
    from scmmgpt.commands.results import evidence_rows, table_of

    labels, cl_ids = read_labels(args.labels)
    names = ("tissue", "cluster_key", "min_score", "error_rate", "matching_weight", "read_batch")
    options = {name: getattr(args, name) for name in names}
    tables: dict[Path, Any] = {}
    if outputs := several_outputs(args):
        if args.table is not None:
            tables[args.table] = lambda results: table_of(results.cells, args.columns)
        if args.evidence is not None:
            tables[args.evidence] = lambda results: evidence_rows(results.found, results.cells)
        options = {"labels": labels, "cl_ids": cl_ids, **options}
        return run_in_partitions(args, outputs, options, lambda results: labels_found(results.cells), tables)
    pipeline, adata = load(args)
    pipeline.annotate(adata, labels, cl_ids=cl_ids, **options, **read_options(args))
    if args.evidence is not None:
        evidence = pipeline.explain(adata, cluster_key=args.cluster_key, **read_options(args))
        tables[args.evidence] = evidence_rows(evidence, adata)
    finish(args, adata, {"cells": adata.n_obs, **labels_found(adata)}, tables=tables)
    return 0


def labels_found(adata: Any) -> dict[str, Any]:
    """The summary of an annotation, with the most frequent label first."""
    done = adata.uns["scmmgpt"]["annotate"]
    pairs = sorted(zip(done["found"], done["found_cells"], strict=True), key=lambda pair: -pair[1])
    summary: dict[str, Any] = {"labels": {str(name): int(n) for name, n in pairs}}
    if (clusters := done.get("clusters")) is not None:
        summary["clusters"] = dict(zip(map(str, clusters["cluster"]), map(str, clusters["label"]), strict=True))
    summary["collapsed"] = bool(done["collapsed"])
    return summary | ({"read_batch": True} if done["read_batch"] else {})


def audit(args: Args) -> int:
    """Rank given labels that the other cells of the file, the model and markers contradict."""
    from scmmgpt.commands.results import audit_rows, audit_summary

    options = {"label_key": args.label_key, "cluster_key": args.cluster_key}
    if outputs := several_outputs(args):
        tables = {} if args.table is None else {args.table: lambda results: audit_rows(results.found, results.cells)}
        return run_in_partitions(args, outputs, options, lambda results: audit_summary(results.found), tables)
    pipeline, adata = load(args)
    judged = pipeline.audit(adata, **options, **read_options(args))
    finish(args, adata, {"cells": adata.n_obs, **audit_summary(judged)}, audit_rows(judged, adata))
    return 0


def chat(args: Args) -> None:
    """Answer questions about a selection of cells by counting."""
    from scmmgpt.commands.chat import Chat, answers

    pipeline, adata = load(args)
    about = Chat(pipeline, adata, args.select, **read_options(args))
    for found, lines in answers(about, args.ask, args.json):
        write(args, found, lines)


def describe(args: Args) -> None:
    """Describe each cell in words."""
    sampler = None
    if args.templates != "default" and not args.reference:
        raise ValueError("--templates needs --reference, whose captions use the templates; pass both or neither.")
    if args.reference:
        from scmmgpt.train.data.captions import CaptionSampler

        sampler = CaptionSampler(args.templates)
    pipeline, adata = load(args)
    tables: dict[Path, Any] = {}
    if args.proof is not None:
        import pandas as pd

        pipeline.describe(adata, args.prompt, proof=True, cluster_key=args.cluster_key, **read_options(args))
        tables[args.proof] = pd.DataFrame(adata.uns["scmmgpt"]["describe"]["clauses"])
    else:
        options = {name: getattr(args, name) for name in ("max_new_tokens", "num_beams")}
        pipeline.describe(adata, args.prompt, cluster_key=args.cluster_key, **options, **read_options(args))
    if sampler is not None:
        from scmmgpt.cells_scmmgpt import hash_names

        obs = {name: adata.obs[name].astype(object).to_numpy() for name in adata.obs.columns}
        adata.obs["scmmgpt_reference"] = sampler.answer(obs, cell_ids=hash_names(adata.obs_names))
    texts = adata.obs["scmmgpt_description"]
    found = {"cells": adata.n_obs, "distinct_descriptions": texts.nunique(), "first": str(texts.iloc[0])}
    finish(args, adata, found, tables=tables)


def calibrate(args: Args) -> None:
    """Fit probabilities to labelled cells; store labels and settings in the checkpoint."""
    from scmmgpt.commands.calibration import calibrate_checkpoint, check_config

    check_config(args.model)
    pipeline, adata = load(args)
    write(args, calibrate_checkpoint(pipeline, adata, args.model, args.file, args.label_key, read_options(args)))


def embed(args: Args) -> int:
    """Embed each cell, for neighbours, maps, clusters or an index."""

    def found(adata: Any) -> dict[str, Any]:
        return {"dimensions": int(adata.obsm["X_scmmgpt"].shape[1])}

    if outputs := several_outputs(args):
        return run_in_partitions(args, outputs, {"of": args.of}, lambda results: found(results.cells))
    pipeline, adata = load(args)
    pipeline.embed(adata, of=args.of, **read_options(args))
    finish(args, adata, {"cells": adata.n_obs, **found(adata)})
    return 0


def index(args: Args) -> None:
    """Add embedded cells to an index for `search --index`."""
    from scmmgpt.commands.index import add_files

    started()  # without a checkpoint
    check_folder(args.output)
    done = add_files(args.output, args.file, args.workers or 1, args.cluster)
    write(args, {"output": str(args.output), **done})


def search(args: Args) -> int:
    """Find the cells that a text describes best, or the cells that are most like given cells."""
    if args.like is not None and args.file is None:
        raise ValueError("Name the FILE with the cells of --like; --index only names the cells to search.")
    if args.like is not None and args.by != "similarity":
        raise ValueError(f"--by {args.by} needs --text; --like compares cells by similarity.")
    if args.like is None and (args.file is None) == (args.index is None):
        raise ValueError("Name the cells to search: either FILE or --index.")
    if args.index is not None:
        if args.by != "similarity":
            raise ValueError(f"--by {args.by} needs the counts of FILE; an index has embeddings only.")
        search_in_index(args)
        return 0
    if args.where is not None:
        raise ValueError("--where filters the cells of an index; pass --index, or filter FILE before the search.")
    from scmmgpt.commands.results import render_hits, write_result

    key = None if args.output is None else "scmmgpt_search"
    if args.workers or args.cluster:
        if args.output is None:
            raise ValueError("--workers and --cluster need --output: partitions are stored beside the output.")
        options = {"text": args.text, "top_k": args.top_k, "like": args.like, "by": args.by, "key_added": key}
        outputs = several_outputs(args)
        return run_in_partitions(args, outputs, options, lambda results: {"hits": results.found}, lines=render_hits)
    pipeline, adata = load(args)
    options = {"like": args.like, "by": args.by, "key_added": key}
    hits = pipeline.search(adata, args.text, args.top_k, **options, **read_options(args))
    if args.output is not None:
        with whole_file(args.output) as temporary:
            write_result(adata, args.file, temporary)
    write(args, hits, render_hits(hits))
    return 0


def search_in_index(args: Args) -> None:
    """Search the cells of an index."""
    from scmmgpt.commands.index import find_like, find_text, read_manifest, render_hits

    if args.output is not None:
        raise ValueError("--output needs FILE: in an index, only the best cells are scored.")
    read_manifest(args.index)
    if args.like is not None:
        pipeline, adata = load(args)
        which = adata, args.like
        hits = find_like(args.index, *which, pipeline, args.model, args.top_k, args.where, **read_options(args))
    else:
        hits = find_text(args.index, args.text, load_pipeline(args), args.model, args.top_k, args.where)
    write(args, [vars(hit) for hit in hits], render_hits(hits))


def generate(args: Args) -> None:
    """Generate counts of new cells from descriptions in words."""
    check_outputs(args)
    prompts: Any = list(args.prompts)
    if args.prompts_file is not None:
        prompts += [line.strip() for line in read_text(args.prompts_file).splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"{args.prompts_file} has no prompts. Write one prompt per line.")
    files = [prompt for prompt in args.prompts if exists(Path(prompt)) and Path(prompt).is_file()]
    if files:
        raise ValueError(f"{files[0]!r} is a file, not a description. For a file of prompts, pass --prompts-file.")
    if bool(prompts) == args.stored_labels:
        raise ValueError("Name the cells to generate: one or more prompts, --prompts-file, or --stored-labels alone.")
    genes = args.genes
    pipeline = load_pipeline(args)
    if args.stored_labels:
        prompts = pipeline.label_prompts()
    if args.genes_of is not None:
        cells, _ = pipeline.processor.read_cells(read_adata(args.genes_of), force=True)
        genes = pipeline.processor.gene_symbols(sorted(set(cells.gene_ids.tolist())))
    generated = pipeline.generate(prompts, args.n_cells, genes=genes, library_size=args.library_size, seed=args.seed)
    finish(args, generated, {"cells": generated.n_obs, "genes": generated.n_vars})


def inspect(args: Args) -> int:
    """Report what a file holds, whether the file can be used, and how it is read; exit status 0 if usable."""
    from scmmgpt.commands.inspect_input import inspect_file, render

    package = logging.getLogger("scmmgpt")
    level = package.level
    package.setLevel(logging.ERROR)  # the report includes the warnings
    try:
        gene_index = None
        if args.model is not None:
            from scmmgpt.commands.checkpoints import find_checkpoint
            from scmmgpt.processing_scmmgpt import ScMMGPTProcessor

            find_checkpoint(args.model)
            gene_index = ScMMGPTProcessor.from_pretrained(args.model).gene_index
        report = inspect_file(args.file, gene_index, max_cells=args.max_cells, **read_options(args))
    except Exception as error:
        if not args.json or args.debug:
            raise
        write_error(explain(error, [args.file]), usable=False)
        return ERROR
    finally:
        package.setLevel(level)
    write(args, report, [render(report)])
    return 0 if report["usable"] else ERROR


def verify(args: Args) -> int:
    """Compute the results of a file again and name what changed; exit status 0 if nothing changed."""
    from scmmgpt.commands.verify import checkpoint_of, render, verify_file

    if args.model is None:
        args.model = checkpoint_of(args.file)
        if not Path(args.model).is_dir():
            logging.getLogger("scmmgpt").warning(f"The receipt names {args.model!r}; pass --model for another place.")
    pipeline = load_pipeline(args)
    source = None if args.input is None else lambda: read_adata(args.input, args.split, args.model, backed=True)
    report = verify_file(args.file, pipeline, source)
    write(args, report, render(report))
    return 0 if report["verified"] else 1


def report(args: Args) -> None:
    """Write a page about the results of a file: map, labels, evidence, descriptions, warnings, receipt."""
    from scmmgpt.commands.report import KEY, describe_some, report_page
    from scmmgpt.records_scmmgpt import need_columns

    if args.output.suffix not in (".html", ".htm"):
        raise ValueError(f"--output is {str(args.output)!r}; its name must end in .html.")
    check_paths({"FILE": args.file, "--model": args.model}, {"--output": args.output})
    check_file(args.output)
    adata = read_adata(args.file, args.split, args.model)
    need_columns(adata.obs, *columns_of(args))
    if f"{KEY}_cell_type" not in adata.obs:
        choose_model(args)
        pipeline = load_pipeline(args)
        pipeline.annotate(adata, cluster_key=args.cluster_key, **read_options(args))
        if pipeline.can_explain:
            pipeline.explain(adata, cluster_key=args.cluster_key, **read_options(args))
            describe_some(pipeline, adata, args.cluster_key, **read_options(args))
    with log_if_slow("Drawing the page"):
        page = report_page(adata, args.file.name, args.label_key)
    with whole_file(args.output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    write(args, {"output": str(args.output), "cells": adata.n_obs})


def plan(args: Args) -> None:
    """Measure the cost of a cell on this machine, and predict time, memory and storage for many cells."""
    import time

    from scmmgpt.commands.checkpoints import find_checkpoint
    from scmmgpt.commands.partition_tasks import Job, default_options
    from scmmgpt.commands.plan import describe_plan, measure

    find_checkpoint(args.model)
    args.quiet = True  # no progress bars for samples
    began = time.perf_counter()
    pipeline, loaded = load_pipeline(args), time.perf_counter() - began
    options = default_options(args.verb, args.label_key, args.text)
    job = Job(args.verb, args.model, args.device, args.batch_size, options, read_options(args))
    costs = measure(job, pipeline, Source(args.file, args.split, args.model), loaded, args.seconds)
    workers = args.workers or sorted({1, os.cpu_count() or 1})
    found, lines = describe_plan(costs, args.cells, workers)
    write(args, found, lines)


def export(args: Args) -> None:
    """Write the language model and the cell encoder as two folders, for engines that serve language models."""
    from scmmgpt.commands.checkpoints import check_checkpoint
    from scmmgpt.commands.serving import export_checkpoint

    check_folder(args.output)
    check_checkpoint(args.model)
    write(args, export_checkpoint(args.model, args.output))


def doctor(args: Args) -> None:
    """Show device and versions of the installed packages."""
    from scmmgpt.commands.doctor import describe_machine

    found = describe_machine()
    write(args, found, (f"{name:<28}{value}" for section in found.values() for name, value in section.items()))


def mcp(args: Args) -> None:
    """Serve the commands to an agent by the Model Context Protocol, for the files of one folder."""
    from scmmgpt.commands.mcp_server import serve

    started()  # without a checkpoint
    serve(args.folder, run_words, args.model, {"device": args.device, "batch-size": args.batch_size})


# -- shared -----------------------------------------------------------------------------------------------------------


def load(args: Args) -> "tuple[ScMMGPTPipeline, anndata.AnnData]":
    """The pipeline and the AnnData of a command, after checks of the arguments; the file is opened first."""
    from scmmgpt.commands.checkpoints import find_checkpoint
    from scmmgpt.records_scmmgpt import need_columns

    check_outputs(args)
    find_checkpoint(args.model)
    adata = read_adata(args.file, args.split, args.model, backed=True)
    need_columns(adata.obs, *columns_of(args))
    if getattr(args, "output", None) is not None:
        from scmmgpt.commands.results import rehearse

        with log_if_slow("Rehearsing the writing of the result"):
            rehearse(adata, args.file, args.output)
    return load_pipeline(args), adata


def columns_of(args: Args) -> list[str]:
    """Columns of `obs` that options name."""
    keys = (getattr(args, key, None) for key in ("label_key", "cluster_key"))
    return [*filter(None, keys), *getattr(args, "columns", ())]


def choose_model(args: Args) -> None:
    """Set `args.model` to the checkpoint of this package if no model is named, and print its name."""
    if args.model is None:
        from scmmgpt.commands.checkpoints import identify, root_checkpoint

        args.model = root_checkpoint()
        args.identity = identify(args.model)
        name, version, digest = args.identity.values()
        sys.stderr.write(f"Model: {name} {version}, sha256 {digest[:16]}, of this package.\n")


def load_pipeline(args: Args) -> "ScMMGPTPipeline":
    """The pipeline of `--model`."""
    with log_if_slow(f"Loading {args.model}"):
        from transformers.utils import logging

        from scmmgpt.commands.checkpoints import check_checkpoint
        from scmmgpt.commands.doctor import check_device
        from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline

        check_device(args.device)
        check_checkpoint(args.model)
        logging.disable_progress_bar()  # the progress bar of loading weights
        try:
            return ScMMGPTPipeline.from_pretrained(args.model, device=args.device, batch_size=args.batch_size)
        finally:
            started()
            if not (args.quiet or args.json):
                logging.enable_progress_bar()


def run_in_partitions(
    args: Args,
    outputs: dict[Source, Path],
    options: dict[str, Any],
    found: Callable[[Any], dict[str, Any]],
    tables: dict[Path, Callable[[Any], Any]] | None = None,
    lines: Callable[[Any], list[str]] | None = None,
) -> int:
    """Compute a command in partitions, write the results, and return the exit status.

    The status is `INCOMPLETE` if some cells have no result. `found` and `tables` are as in `compute_outputs`; `lines`
    renders the hits of a search.
    """
    from scmmgpt.commands.checkpoints import find_checkpoint
    from scmmgpt.commands.partition_tasks import Job
    from scmmgpt.commands.partitions import compute_outputs

    find_checkpoint(args.model)
    identity = getattr(args, "identity", None)
    job = Job(args.command, args.model, args.device, args.batch_size, options, read_options(args), identity)
    where = (args.workers or 1, args.cluster, args.cells_per_partition)
    rest = (tables or {}, found, columns_of(args), getattr(args, "evidence", None) is not None)
    summary, failures = compute_outputs(job, outputs, lambda: load_pipeline(args), args.output, where, *rest)
    for line in failures:
        sys.stderr.write(reworded(f"scmmgpt {args.command}: {line}\n"))
    if lines is None:
        write(args, {"output": str(args.output), **summary})
    else:
        write(args, summary["hits"], lines(summary["hits"]))
    return INCOMPLETE if failures else 0


def read_options(args: Args) -> dict[str, Any]:
    """Arguments of the command line for `read_cells`."""
    options = {name: getattr(args, name) for name in READ_HELP if getattr(args, name) is not None}
    return {**options, "force": args.force}


def read_labels(values: list[str] | None) -> tuple[Any, dict[str, str] | None]:
    """`--labels` as `(labels, cl_ids)`: a list of names, or label -> text if a file describes labels."""
    if not values:
        return None, None
    words = read_words(values)
    labels = {label: words.texts.get(label, label) for label in words.labels} if words.texts else words.labels
    return labels, words.cl_ids


if __name__ == "__main__":
    sys.exit(main())
