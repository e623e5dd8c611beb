"""The files for clusters: they parse, and the training that they start is one that the command line takes."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import parse_args

from tests.test_docs import check_typed

FOLDER = Path(__file__).parents[2] / "examples" / "cluster"
TRAINING = ["train", "train.yaml", "--resume"]


def checked(words: list[str]) -> object:
    """What torchrun makes of the words behind its name; the training behind `-m sd3tune` is parsed, too."""
    asked = parse_args(words)
    assert (asked.module, asked.training_script, asked.training_script_args) == (True, "sd3tune", TRAINING)
    check_typed([word.replace("train.yaml", "my.yaml") for word in asked.training_script_args])
    return asked


@pytest.mark.parametrize("name", ["slurm.sh", "no-shared-disk.sh"])
def test_a_script_is_one_that_bash_and_torchrun_take(name: str) -> None:
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)
    text = (FOLDER / name).read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^(?:srun )?torchrun (.*)$", text, re.MULTILINE)
    line = re.sub(r'"\$\(.*?\):29500"', "head:29500", line)  # the first machine of the job
    filled = {"$SLURM_NNODES": "2", "$SLURM_JOB_ID": "7", "$NODE_RANK": "1", "$MASTER_ADDR": "10.0.0.1"}
    asked = checked([filled.get(word, word) for word in shlex.split(line)])
    assert (asked.nnodes, asked.nproc_per_node) == ("2", "8")
    assert (asked.rdzv_backend == "c10d") == ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text)


def test_the_manifest_starts_one_training_on_all_its_machines() -> None:
    manifest = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 2
    assert spec["completionMode"] == "Indexed"
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"] == ["torchrun"]
    asked = checked([word.replace("$(NODE_RANK)", "1") for word in container["args"]])
    assert (asked.nnodes, asked.nproc_per_node) == ("2", str(container["resources"]["limits"]["nvidia.com/gpu"]))
    name = manifest["metadata"]["name"]
    assert asked.master_addr == f"{name}-{job['name']}-0-0.{name}"
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
