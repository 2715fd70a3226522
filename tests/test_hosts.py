"""Several hosts, a process that dies, hosts with other files: told once, in time; what cannot be spread says so."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from processes import CPU, LOGIC, end_group, free_port, of_rank, processes
from programs import RUN, TIMEOUT, Program, ran

from pipeline.attribution.profile import GoldenProfile
from pipeline.cli import main

pytestmark = pytest.mark.distributed


@pytest.fixture
def asked(tiny_folder: Path, request_file: Path) -> list[str]:
    return ["--model", str(tiny_folder), "--requests", str(request_file)]


def of_srun(rank: int, port: int) -> dict[str, str]:
    """What SLURM tells a task."""
    told = {"NTASKS": 2, "JOB_NAME": "edit", "JOB_ID": 1, "PROCID": rank, "LOCALID": 0, "NODEID": rank}
    told |= {"NTASKS_PER_NODE": 1, "NODELIST": "127.0.0.1", "NNODES": 2}
    return {f"SLURM_{name}": str(value) for name, value in told.items()} | {"MASTER_PORT": str(port)}


def of_torchrun(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells the one process of a host."""
    return of_rank(rank, 2, port) | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank)}


def asked_of_two(asked: list[str]) -> list[str]:
    """The command line on each of two hosts."""
    on = ["--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "fsdp2"]
    return ["attribute", *asked, *LOGIC, *CPU, *on]


@pytest.mark.parametrize("told_by", [of_srun, of_torchrun])
def test_two_hosts(told_by: Callable[[int, int], dict[str, str]], asked: list[str], tmp_path: Path) -> None:
    """Two hosts on the loopback, a process each, name one default output folder and write it once."""
    assert main(["attribute", *asked, *LOGIC, *CPU, "--output", str(tmp_path / "one")]) == 0
    port = free_port()
    with ExitStack() as stack:
        told = [{"GOLDEN_LAYERS_STARTED": f"at-{rank}"} | told_by(rank, port) for rank in range(2)]
        hosts = [
            stack.enter_context(Program(RUN, *asked_of_two(asked), folder=tmp_path, environment=one))
            for one in told
        ]
        ended = [host.finished() for host in hosts]
    assert [one.returncode for one in ended] == [0, 0], [one.stderr for one in ended]
    assert [one.stdout.count("written to") for one in ended] == [1, 0]
    the_same_scores(tmp_path)


@pytest.mark.slow
def test_two_hosts_by_torchrun_itself(asked: list[str], tmp_path: Path) -> None:
    assert main(["attribute", *asked, *LOGIC, *CPU, "--output", str(tmp_path / "one")]) == 0
    port = free_port()
    hosts = [
        subprocess.Popen(
            [sys.executable, *by_torchrun(rank, port), str(RUN), *asked_of_two(asked)], cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GOLDEN_LAYERS_STARTED": f"at-{rank}"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [started.communicate(timeout=TIMEOUT)[0] for started in hosts]
    finally:
        for started in hosts:
            end_group(started.pid)
    assert [started.returncode for started in hosts] == [0, 0], said
    assert [text.count("written to") for text in said] == [1, 0]
    the_same_scores(tmp_path)


def by_torchrun(rank: int, port: int) -> list[str]:
    """A host's agent."""
    agent = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(rank)]
    agent += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    return ["-m", "torch.distributed.run", *agent]


def the_same_scores(folder: Path) -> None:
    """One process found what two hosts did, whose folder stands below `runs`."""
    (together,) = (folder / "runs").iterdir()  # although hosts would name it differently, by when they started
    assert together.name == "attribute-at-0" and not (together / "unfinished").exists()
    scores = [GoldenProfile.load(at).scores for at in (folder / "one", together)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-9)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_dies_ends_the_others(rank: int, asked: list[str], tmp_path: Path) -> None:
    """Killed in the middle of its work, be it the first, its end is told once, and in time."""
    words = ["attribute", *asked, *CPU, "--expert.batch_size", "1", "--output", str(tmp_path / "out")]
    words += ["--trainer.devices", "2", "--trainer.strategy", "fsdp2"]
    dying = dying_program(tmp_path, rank)
    began = time.monotonic()
    told = ran(dying, *words, folder=tmp_path, environment={"PYTHONPATH": str(RUN.parent)})
    assert told.returncode == 1
    assert told.stderr.count("error:") == 1 and "Traceback" not in told.stderr
    assert f"error: trainer: process {rank} has ended (SIGKILL)" in told.stderr
    assert time.monotonic() - began < TIMEOUT / 2


def dying_program(folder: Path, rank: int) -> Path:
    """run.py, of which one process kills itself when the first batch is attributed."""
    dying = folder / "dying.py"
    dying.write_text(
        "import os, signal, sys\n"
        "from pipeline.attribution.lga import Attribution\n"
        "from pipeline.cli import main\n"
        "step = Attribution.step\n"
        "def die(self, batch):\n"
        f"    if self.global_rank == {rank}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, batch)\n"
        "Attribution.step = die\n"
        "sys.exit(main())\n"
    )
    return dying


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_on_another_host(rank: int, asked: list[str], tmp_path: Path) -> None:
    """Both hosts' commands end in time; the one that lives says why in one line."""
    port, dying, began = free_port(), dying_program(tmp_path, rank), time.monotonic()
    words = ["attribute", *asked, *CPU, "--output", str(tmp_path / "out"), "--expert.batch_size", "1"]
    words += ["--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "fsdp2"]
    hosts = [
        subprocess.Popen(
            [sys.executable, *by_torchrun(host, port), str(dying), *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RUN.parent)},
        )
        for host in (0, 1)
    ]  # fmt: skip
    try:
        said = [host.communicate(timeout=TIMEOUT)[0] for host in hosts]
    finally:
        for host in hosts:
            end_group(host.pid)
    assert all(host.returncode for host in hosts)
    assert said[1 - rank].count("error: trainer: another process of this command has ended") == 1, said[1 - rank]
    assert time.monotonic() - began < TIMEOUT / 2


@pytest.mark.slow
def test_one_process_short_of_memory(asked: list[str], tmp_path: Path) -> None:
    """It halves its batches; where all share the weights it cannot, and one line says what to do instead."""
    scarce = tmp_path / "scarce.py"
    scarce.write_text(
        "import os, sys, torch\n"
        "from pipeline.cli import main\n"
        "forward = torch.nn.Embedding.forward\n"
        "def take(self, ids):\n"
        "    if os.environ.get('LOCAL_RANK') == '1' and ids.dim() == 2 and len(ids) > 2:\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory.')\n"
        "    return forward(self, ids)\n"
        "torch.nn.Embedding.forward = take\n"
        "sys.exit(main())\n"
    )
    words = ["attribute", *asked, "--expert.batch_size", "2"]  # four rows: old and new answers
    assert main([*words, *CPU, "--output", str(tmp_path / "one")]) == 0
    told = processes(*words, "--output", str(tmp_path / "two"), program=scarce)
    assert told.returncode == 0, told.stderr
    scores = [GoldenProfile.load(tmp_path / name).scores for name in ("one", "two")]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)

    told = processes(*words, "--output", str(tmp_path / "spread"), program=scarce, strategy="fsdp2")
    assert told.returncode == 1
    assert told.stderr.count("error:") == 1 and "Traceback" not in told.stderr
    assert "CUDA out of memory" in told.stderr and "give a smaller --expert.batch_size" in told.stderr
    assert not (tmp_path / "spread").exists()


def test_hosts_with_different_files(asked: list[str], request_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(
        "import os, sys\n"
        "from pipeline.cli import main\n"
        "at = sys.argv.index('--requests') + 1\n"
        "if os.environ.get('LOCAL_RANK') == '1':\n"
        "    sys.argv[at] = 'demo'\n"
        "sys.exit(main())\n"
    )
    words = ["attribute", *asked, *CPU, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    words += ["--output", str(tmp_path / "out")]
    told = ran(other, *words, folder=tmp_path, environment={"PYTHONPATH": str(RUN.parent)})
    assert told.returncode == 1
    assert told.stderr.count("error: requests: not the same in all 2 processes: process 1 on ") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study"], "trainer.strategy: fsdp2; study needs the whole model on each device: auto or ddp"),
        (["attribute", "--trainer.accelerator", "gpu"], "trainer: "),
    ],
)
def test_what_a_strategy_cannot_do(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "gpu" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main([*words, "--trainer.strategy", "fsdp2", "--trainer.devices", "2"]) != 0
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {said}")
