"""The files for SLURM and Kubernetes are valid, and their command lines are read by the parsers of the commands."""

import re
import shlex
import subprocess

import pytest
import yaml

from scmmgpt.tests.test_packaging import ROOT


FOLDER = ROOT / "train" / "configs" / "cluster"
SCRIPTS, MANIFESTS = sorted(FOLDER.glob("*.sbatch")), sorted(FOLDER.glob("*.yaml"))
# Options of sbatch that the scripts may use, with the form of their value (https://slurm.schedmd.com/sbatch.html).
DIRECTIVES = {
    **dict.fromkeys(("job-name", "output"), r"[\w%-]+(\.log)?"),
    **dict.fromkeys(("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task"), r"\d+"),
    **{"time": r"\d+:\d\d:\d\d", "mem-per-cpu": r"\d+[KMGT]", "requeue": None, "open-mode": "append|truncate"},
}


def read_words(words):
    """Parse the words of a command line by the parser of the command."""
    if words[0] == "srun":
        words = [word for word in words[1:] if not word.startswith("--kill-on-bad-exit")]
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        found = get_args_parser().parse_args(words[1:])
        assert (found.rdzv_backend, found.module, found.training_script) == ("c10d", True, "scmmgpt.train")
        assert found.rdzv_endpoint.endswith(":29500")
        options = dict(zip(*[iter(re.split(r"[ =]", " ".join(found.training_script_args[1:])))] * 2, strict=True))
        assert set(options) >= {"--config", "--corpus", "--output_dir"}
        assert options["--resume_from_checkpoint"] == "latest"
        return (ROOT / "train" / "configs" / options["--config"].rsplit("/")[-1]).is_file()
    if words[0] == "scmmgpt":
        from scmmgpt.__main__ import make_parser

        return make_parser().parse_args(words[1:]).cluster is not None
    assert words[0] == "dask"
    command = pytest.importorskip("distributed.cli.dask_" + words[1], reason="Dask is not installed").main
    return command.make_context(words[1], words[2:]).params is not None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_of_slurm_is_read_by_bash_and_its_commands_by_their_parsers(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    directives = [line.split(" ", 1)[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    for directive in directives:
        name, _, value = directive.removeprefix("--").partition("=")
        assert re.fullmatch(DIRECTIVES[name] or "", value), directive
    body = text.replace("\\\n", " ").splitlines()
    first = next(i for i, line in enumerate(body) if line.startswith("set -"))
    assert all(not line.startswith("#SBATCH") for line in body[first:]), "sbatch reads none after the first command"
    commands = [line for line in body if line.split(" ")[0] in ("srun", "dask", "scmmgpt")]
    assert commands
    for line in commands:
        assert read_words(shlex.split(line.replace("$address", "tcp://node:8786").rstrip("&")))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_of_kubernetes_fits_together_and_its_commands_are_read_by_their_parsers(path):
    parts = list(yaml.safe_load_all(path.read_text()))
    pods = [part["spec"]["template"] for part in parts if part["kind"] != "Service"]
    labels = [pod["metadata"]["labels"] for pod in pods]
    for service in (part for part in parts if part["kind"] == "Service"):
        assert service["spec"]["selector"] in labels
    for pod in pods:
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
            assert read_words([*container["command"], *container["args"]])


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_passes_the_schemas_of_kubernetes(path):
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for part in yaml.safe_load_all(path.read_text()):
        validator.validate(part, "1.33", strict=True)
