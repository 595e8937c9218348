"""The LoRA adapter of `tune`: the base that it adapts, its card, and the merge into the checkpoint.

```
OUTPUT_DIR/                the checkpoint, with the adapter merged
OUTPUT_DIR/base/           the joined model before training, which the adapter names as its base
OUTPUT_DIR/adapter/        the adapter alone
OUTPUT_DIR/checkpoint-N/   the adapter after N steps, of the same base
```

An adapter loads with its base by `AutoPeftModelForCausalLM.from_pretrained(ADAPTER, trust_remote_code=True)`. With
`--push_to_hub`, base and adapter get repositories of their own, `NAME-base` and `NAME-adapter`, beside that of the
checkpoint, and the adapter names the former.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers import ProcessorMixin

from scmmgpt.commands.files import obey_umask, read_json, whole_folder, write_json
from scmmgpt.modeling_scmmgpt import ScMMGPTForConditionalGeneration
from scmmgpt.train.data.sharing import push_folder
from scmmgpt.train.language_model import dequantize


ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)


def save_base(
    model: ScMMGPTForConditionalGeneration, processor: ProcessorMixin, output_dir: str, *, resumed: bool, writes: bool
) -> None:
    """Save the joined model in `OUTPUT_DIR/base`, and give it that name, by which adapters will refer to it.

    Args:
        resumed: Whether the run goes on: an existing base stays as it is.
        writes: Whether this process is the one that writes.
    """
    base = Path(output_dir, "base").absolute()
    if writes and not (resumed and base.exists()):
        base.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(base, ignore_errors=True)
        with whole_folder(base) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            obey_umask(folder)
    model.name_or_path = model.config._name_or_path = str(base)  # from where PEFT takes the name


def save_adapter(
    tuned: PeftModel, output_dir: str, write_card: Callable[[str], object], hub: dict[str, Any] | None
) -> None:
    """Save the adapter in `OUTPUT_DIR/adapter`, and record in the checkpoint that it will have the adapter merged.

    Args:
        write_card: `write_card(folder)` writes the card.
        hub: Arguments of [`push_folder`], `repo_id` of the checkpoint among them, to push base and adapter; or `None`.
    """
    folder, base = Path(output_dir, "adapter"), str(tuned.peft_config["default"].base_model_name_or_path)
    tuned.save_pretrained(str(folder))
    obey_umask(folder)
    for name in ADAPTER_FILES:  # copies that pushes on the way leave beside the checkpoint
        Path(output_dir, name).unlink(missing_ok=True)
    model: Any = tuned.get_base_model()
    names = [*(model.config.adapter_bases or []), base]  # the base may have an adapter merged, too
    if hub is not None and Path(base).is_dir():
        names.append(push_folder(base, **hub | {"repo_id": f"{hub['repo_id']}-base"}))
        commit = HfApi(token=hub["token"]).model_info(names[-1], revision=hub["revision"]).sha
        named = {"base_model_name_or_path": names[-1], "revision": commit}
        write_json(folder / CONFIG_NAME, read_json(folder / CONFIG_NAME) | named)
    write_card(str(folder))
    if hub is not None:
        push_folder(folder, **hub | {"repo_id": f"{hub['repo_id']}-adapter"})
    model.config.adapter_bases = names


def merge(tuned: Any, model: ScMMGPTForConditionalGeneration, in_4bit: bool) -> Any:
    """The model with its adapter, if it has one, merged, and without 4-bit weights."""
    if in_4bit:
        dequantize(model)
    return tuned.merge_and_unload() if isinstance(tuned, PeftModel) else tuned
