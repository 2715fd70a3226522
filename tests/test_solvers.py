"""Each closed-form solver against a dense plain reference, and against what it promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.editing.solvers import TEXT, alphaedit, emmet, memit, rome, sparing
from pipeline.errors import UserError

INPUTS, OUTPUTS, REQUESTS = 12, 7, 4


@pytest.fixture
def system() -> tuple[Tensor, Tensor, Tensor]:
    """Keys, wanted changes, and the second moment of 200 keys of text."""
    torch.manual_seed(0)
    text = torch.randn(INPUTS, 200) * torch.linspace(3, 0.3, INPUTS)[:, None]
    return torch.randn(INPUTS, REQUESTS), torch.randn(OUTPUTS, REQUESTS), text @ text.T / 200


def close(found: Tensor, expected: np.ndarray) -> bool:
    return np.allclose(found.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_memit_is_its_formula(system: tuple[Tensor, Tensor, Tensor]) -> None:
    K, R, C = (part.double().numpy() for part in system)
    weight = 10 * (np.square(K).sum(0).mean() / np.trace(C))
    assert close(memit(*system, strength=10), R @ K.T @ np.linalg.inv(weight * C + K @ K.T))


def test_memit_meets_the_requests_as_text_counts_less(system: tuple[Tensor, Tensor, Tensor]) -> None:
    keys, changes, _ = system
    misses = [(memit(*system, strength=s) @ keys.double() - changes).norm().item() for s in (100, 1, 1e-2, 1e-6)]
    assert misses == sorted(misses, reverse=True)
    assert misses[-1] < 1e-4


def test_memit_is_free_of_the_keys_scale(system: tuple[Tensor, Tensor, Tensor]) -> None:
    keys, changes, moment = system
    torch.testing.assert_close(
        memit(keys, changes, moment, 10), memit(1000 * keys, changes, 1e6 * moment, 10) * 1000, rtol=1e-4, atol=1e-6
    )


def test_emmet_is_its_formula_and_meets_its_equality(system: tuple[Tensor, Tensor, Tensor]) -> None:
    K, R, C = (part.double().numpy() for part in system)
    inverse = np.linalg.inv(C)
    found = emmet(*system, ridge=1e-12)
    assert close(found, R @ np.linalg.inv(K.T @ inverse @ K) @ K.T @ inverse)
    assert close(found @ system[0].double(), R)


def test_emmet_moves_text_least_of_all_exact_changes(system: tuple[Tensor, Tensor, Tensor]) -> None:
    keys, changes, moment = (part.double() for part in system)
    found = emmet(keys, changes, moment, ridge=1e-12)
    other = changes @ torch.linalg.pinv(keys)  # meets the requests too

    def moved(change: Tensor) -> float:
        return (change @ moment @ change.T).trace().item()

    assert moved(found) < moved(other)


def test_rome_is_emmet_with_one_request_and_ends_on_the_last(system: tuple[Tensor, Tensor, Tensor]) -> None:
    keys, changes, moment = system
    one = (keys[:, :1], changes[:, :1], moment)
    torch.testing.assert_close(rome(*one, ridge=1e-9), emmet(*one, ridge=1e-9))
    last = rome(*system, ridge=1e-9) @ keys[:, -1].double()
    torch.testing.assert_close(last, changes[:, -1].double(), rtol=1e-5, atol=1e-6)


def test_alphaedit_leaves_text_alone(system: tuple[Tensor, Tensor, Tensor]) -> None:
    keys, changes, moment = system
    threshold = 0.1
    values, vectors = torch.linalg.eigh(moment.double())
    busy = vectors[:, values >= threshold * values[-1]]
    assert 0 < busy.shape[1] < INPUTS
    found = alphaedit(*system, threshold=threshold)
    assert (found @ busy).abs().max() < 1e-9, "what text uses is not touched"
    assert (found @ keys.double()).norm() > 0.1 * changes.norm(), "and the requests are answered"
    P = (torch.eye(INPUTS) - busy @ busy.T).numpy()
    K, R = keys.double().numpy(), changes.double().numpy()
    s = 0.01 * np.square(P @ K).sum(0).mean()
    assert close(found, R @ K.T @ P @ np.linalg.inv(K @ K.T @ P + s * np.eye(INPUTS)))


def test_alphaedit_keeps_what_earlier_updates_learnt(system: tuple[Tensor, Tensor, Tensor]) -> None:
    keys, changes, moment = system
    earlier = keys[:, :1] + 0.3 * torch.randn(INPUTS, 1)
    learnt = torch.randn(len(changes), 1)
    both = torch.cat([earlier, keys], 1), torch.cat([learnt, changes], 1)
    alone = alphaedit(earlier, learnt, moment, 0.5) @ earlier.double()
    forgotten = (alphaedit(keys, changes, moment, 0.5) @ earlier.double() - alone).norm()
    kept = (alphaedit(*both, moment, 0.5) @ earlier.double() - alone).norm()
    assert kept < 0.5 * forgotten


def test_memit_leaves_inputs_alone_that_nothing_uses(system: tuple[Tensor, Tensor, Tensor]) -> None:
    keys, changes, moment = system
    used = torch.arange(INPUTS) % 3 > 0  # as a ReLU's units of which a third is dead
    found = memit(keys * used[:, None], changes, moment * used * used[:, None], strength=10)
    assert not found[:, ~used].any()
    torch.testing.assert_close(found[:, used], memit(keys[used], changes, moment[used][:, used], strength=10))


def test_a_singular_system_says_what_to_raise(system: tuple[Tensor, Tensor, Tensor]) -> None:
    keys, changes, _ = system
    with pytest.raises(UserError, match="singular; give"):
        memit(keys, changes, torch.zeros(INPUTS, INPUTS), strength=1)
    with pytest.raises(UserError, match="no direction is free"):
        alphaedit(keys, changes, torch.eye(INPUTS), threshold=1e-3)


def test_sparing_is_the_least_squares_solution(system: tuple[Tensor, Tensor, Tensor]) -> None:
    _, change_OK, C = (part.double() for part in system)
    change = change_OK @ torch.randn(REQUESTS, INPUTS, dtype=torch.float64)
    taught, others = torch.randn(2, INPUTS, 30, dtype=torch.float64)
    T, N = taught @ taught.T / 30, others @ others.T / 30
    spared = (0.5 / 30) ** 0.5 * others
    text = torch.linalg.cholesky(TEXT * T.trace() / C.trace() * C)
    asked = torch.cat([change @ taught / 30**0.5, torch.zeros(OUTPUTS, 30 + INPUTS)], 1)
    keys = torch.cat([taught / 30**0.5, spared, text], 1)
    expected = torch.linalg.lstsq(keys.T, asked.T).solution.T
    found = change @ sparing(T, N, C, 0.5)
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert (found @ others).norm() < (change @ others).norm()


@pytest.mark.parametrize("solver", [lambda *a: memit(*a, strength=10), emmet, rome, lambda *a: alphaedit(*a, 0.1)])
def test_blocks_of_a_moment_are_a_moment(system: tuple[Tensor, Tensor, Tensor], solver: Any) -> None:
    keys, changes, moment = system
    blocks = torch.stack([moment[:6, :6], moment[6:, 6:]])
    whole = solver(keys, changes, torch.block_diag(*blocks))
    torch.testing.assert_close(
        solver(keys, changes, blocks), whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item()
    )


def test_sparing_is_each_blocks_own(system: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, moment = system
    T, N, C = (torch.stack([moment[at : at + 6, at : at + 6], moment[3:9, 3:9]]) for at in (0, 4, 6))
    whole = sparing(*(torch.block_diag(*each) for each in (T, N, C)), 0.5)
    torch.testing.assert_close(torch.block_diag(*sparing(T, N, C, 0.5)), whole)
