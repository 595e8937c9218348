"""The LoRA adapter of `tune`: its base model, its card, and the merge into the checkpoint.

```
OUTPUT_DIR/                the checkpoint, with the adapter merged
OUTPUT_DIR/base/           the joined model before training, the base of the adapter
OUTPUT_DIR/adapter/        the adapter alone
OUTPUT_DIR/checkpoint-N/   the adapter after N steps, with the same base
```

`AutoPeftModelForCausalLM.from_pretrained(ADAPTER, trust_remote_code=True)` loads an adapter with its base. With
`--push_to_hub`, base and adapter are pushed to separate repositories, `NAME-base` and `NAME-adapter`; the pushed
adapter names `NAME-base` as its base.
"""

import shutil
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
from scmmgpt.train.trainer import CheckpointTrainer


ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)


def save_base(
    model: ScMMGPTForConditionalGeneration, processor: ProcessorMixin, output_dir: str, *, resumed: bool, writes: bool
) -> None:
    """Save the joined model in `OUTPUT_DIR/base`, and name the model by this path, so that adapters refer to it.

    A resumed run keeps an existing base. One process `writes`.
    """
    base = Path(output_dir, "base").absolute()
    if writes and not (resumed and base.exists()):
        base.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(base, ignore_errors=True)
        with whole_folder(base) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            obey_umask(folder)
    model.name_or_path = model.config._name_or_path = str(base)  # PEFT takes the name of the base from here


def save_adapter(trainer: CheckpointTrainer) -> None:
    """Save the adapter in `OUTPUT_DIR/adapter`, and record its base in the configuration of the checkpoint.

    With `push_to_hub`, base and adapter are pushed, each with its card.
    """
    tuned: Any = trainer.model
    hub, output_dir = trainer.hub, str(trainer.args.output_dir)
    folder, base = Path(output_dir, "adapter"), str(tuned.peft_config["default"].base_model_name_or_path)
    tuned.save_pretrained(str(folder))
    obey_umask(folder)
    for name in ADAPTER_FILES:  # intermediate pushes leave copies beside the checkpoint
        Path(output_dir, name).unlink(missing_ok=True)
    model: Any = tuned.get_base_model()
    names = [*(model.config.adapter_bases or []), base]  # an earlier adapter may be merged into the base
    if hub is not None and Path(base).is_dir():
        repo_id = f"{hub['repo_id']}-base"
        if trainer.write_card is not None and not Path(base, "README.md").exists():
            trainer.write_card(base, command="base", log_history=[], repo_id=repo_id)
        names.append(push_folder(base, **hub | {"repo_id": repo_id}))
        commit = HfApi(token=hub["token"]).model_info(names[-1], revision=hub["revision"]).sha
        named = {"base_model_name_or_path": names[-1], "revision": commit}
        write_json(folder / CONFIG_NAME, read_json(folder / CONFIG_NAME) | named)
    trainer.write_adapter_card(str(folder))
    if hub is not None:
        push_folder(folder, **hub | {"repo_id": f"{hub['repo_id']}-adapter"})
    model.config.adapter_bases = names


def merge(tuned: Any, model: ScMMGPTForConditionalGeneration, in_4bit: bool) -> Any:
    """Return the model with its adapter merged, if it has one; 4-bit weights become bfloat16."""
    if in_4bit:
        dequantize(model)
    return tuned.merge_and_unload() if isinstance(tuned, PeftModel) else tuned
