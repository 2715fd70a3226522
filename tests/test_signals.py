"""SIGTERM and Ctrl-C in a real process: at any moment, whatever Lightning has done to the signals meanwhile."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.plugins.environments import SLURMEnvironment
from programs import RUN, Program, wait_for
from torch.distributed.elastic.agent.server import api

from pipeline import cli
from pipeline.editing.editor import edit
from pipeline.editing.finetune import FineTune
from pipeline.model.llm import LLM
from pipeline.options.editing import EditOptions
from pipeline.options.shared import TrainerOptions
from pipeline.output import STARTED
from pipeline.requests.schema import EditRequest
from pipeline.running.interrupts import Interrupted, Interrupts, interrupts
from pipeline.running.launch import supervise
from pipeline.running.trainer import build_trainer
from pipeline.updates.schedule import Stopping

# a command that would train for hours
LONG = ["edit", "--layers", "1", "--method", "finetune", "--expert.whiten", "0", "--expert.learnt", "0"]
LONG += ["--expert.sparing", "0", "--expert.epochs", "1000000", "--output", "out"]


def test_sigterm_while_training(tiny_folder: Path, request_file: Path, tmp_path: Path) -> None:
    words = ["--model", str(tiny_folder), "--requests", str(request_file)]
    with Program(RUN, *LONG, *words, folder=tmp_path) as program:
        wait_for(lambda: list(tmp_path.glob("out/unfinished/edit/*/training.ckpt")))
        program.send_signal(signal.SIGTERM)
        told = program.finished(30)
    assert told.returncode == 143
    assert told.stderr.splitlines()[-1] == "interrupted by SIGTERM"
    assert "the same command with --output out --resume goes on" in " ".join(told.stdout.split())
    assert "Traceback" not in told.stderr


def test_sigterm_while_loading(tiny_folder: Path, request_file: Path, tmp_path: Path) -> None:
    words = ["--model", str(tiny_folder), "--requests", str(request_file)]
    with subprocess.Popen(
        [sys.executable, str(RUN), *LONG, *words], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            wait_for(lambda: (tmp_path / "out" / "options.yaml").exists())  # the model is loaded next
            process.send_signal(signal.SIGTERM)
            _, shown = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 143, shown
    assert shown.splitlines()[-1] == "interrupted by SIGTERM"
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists(), "nothing was done yet"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait_for_the_batch(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    own = Interrupts()
    own.postponing = True
    with own.heeding():
        os.kill(os.getpid(), number)
        assert own.noted == number
        told = capfd.readouterr().err.strip()
        assert told == (
            "stopping when this batch is done; Ctrl-C again: at once" if number == signal.SIGINT else ""
        )
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), number)


def test_a_signal_during_the_clean_up_ends_at_once() -> None:
    child = os.fork()
    if not child:
        try:
            own = Interrupts()
            with own.heeding():
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                except Interrupted:
                    os.kill(os.getpid(), signal.SIGINT)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def test_a_signal_while_an_error_is_told_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = cli.user_line

    def signalled(error: Exception) -> str | None:  # as an agent does when another process has died
        os.kill(os.getpid(), signal.SIGTERM)
        return told(error)

    monkeypatch.setattr(cli, "user_line", signalled)
    assert cli.main(["generate", "--model", "missing"]) != 0
    assert capsys.readouterr().err.count("error:") == 1
    assert not interrupts.postponing


def test_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with interrupts.heeding():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def stepping(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> list[int]:
    """Calls a function in the middle of every optimiser step, with the step's number; the numbers."""
    step, steps = FineTune.training_step, []

    def acting(module: FineTune, batch: Any) -> Any:
        steps.append(len(steps))
        act(steps[-1])
        return step(module, batch)

    monkeypatch.setattr(FineTune, "training_step", acting)
    return steps


def quick_edit() -> EditOptions:
    expert = {"epochs": 3, "whiten": 0.0, "sparing": 0.0, "learnt": 0.0}
    return EditOptions(method="finetune", layers=[1], expert=expert)


def test_from_python_as_well(
    tiny_llm: LLM, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the command line: a stage ends between two batches, and the weights are the base's again."""
    before = signal.getsignal(signal.SIGTERM)
    steps = stepping(monkeypatch, lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 1 else None)
    with pytest.raises(Interrupted):
        edit(tiny_llm, requests, options=quick_edit(), work=tmp_path)
    assert steps == [0, 1]
    assert signal.getsignal(signal.SIGTERM) == before
    assert list(tmp_path.glob("*/training.ckpt"))


def test_a_store_lets_the_batch_finish(
    tiny_llm: LLM, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own way with SIGTERM holds while a stage runs."""
    steps = stepping(monkeypatch, lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 1 else None)
    stopping = Stopping()
    with interrupts.heeding(), stopping.listening():
        edit(tiny_llm, requests, options=quick_edit())
    assert len(steps) == 3 and stopping.is_set()


def test_slurm_is_not_left_to_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its handler saves a checkpoint that `--resume` does not know, and requeues by itself."""
    monkeypatch.setattr(SLURMEnvironment, "detect", staticmethod(lambda: True))
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "edit"}.items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, "0")
    trainer = build_trainer(TrainerOptions(accelerator="cpu", devices=1), "Stage")
    environment = trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment) and not environment.auto_requeue


def test_the_agent_of_several_processes_says_nothing_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", STARTED):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: lambda *_: None)
    api.logger.setLevel(logging.WARNING)  # as torch does, for each of its modules
    assert supervise(["attribute"], 2, SimpleNamespace(trainer=TrainerOptions())) == 0
    assert not api.logger.isEnabledFor(logging.WARNING)
