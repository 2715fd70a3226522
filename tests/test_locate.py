"""Locate-then-edit: subjects are found, values make new answers likely, statistics are right and kept."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_tiny, mean_loss, refusal
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from pipeline.editing import solvers, values
from pipeline.editing.columns import owner
from pipeline.editing.contexts import CONTEXTS, FORMS, in_context
from pipeline.editing.editor import METHODS, can_leave_out, edit, leave_out
from pipeline.editing.locate import LocateThenEdit
from pipeline.editing.solvers import emmet
from pipeline.editing.statistics import give_moments, key_moments, slope_moments
from pipeline.editing.update import WeightUpdate
from pipeline.editing.values import ValueSearch, locate, sparing_text
from pipeline.model.activations import Activations
from pipeline.model.llm import LLM
from pipeline.model.suffix import Suffixes
from pipeline.options.editing import EditOptions, StatisticsOptions
from pipeline.requests.readers import load_requests
from pipeline.requests.schema import EditRequest
from pipeline.running.stage import run
from pipeline.running.trainer import Runtime

ROOT = Path(__file__).parent.parent
LOCATING = [name for name, method in METHODS.items() if "steps" in method.quick]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where statistics are kept, each test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "golden-layers"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Some plain text."""
    file = tmp_path / "text.txt"
    file.write_text("The river of Spain is long and the capital of Norway lies by the sea.\n" * 40)
    return file


@pytest.fixture
def statistics(text: Path) -> StatisticsOptions:
    return StatisticsOptions(text=str(text), tokens=512)


@pytest.fixture
def options(statistics: StatisticsOptions) -> EditOptions:
    settings = {
        "batch_size": 3,
        "steps": 4,
        "threshold": 0.2,
        "spread": 1,
    }  # of so few inputs, text uses nearly all
    return EditOptions(method="memit", layers=[1], expert=settings, statistics=statistics)


@pytest.mark.parametrize("method", LOCATING)
def test_the_down_projection_alone_changes(
    method: str, tiny: LLM, requests: list[EditRequest], options: EditOptions
) -> None:
    base = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    options.method = method
    update = edit(tiny, requests, options=options)
    assert list(update.tensors) == tiny.blocks[1].weight_names("down")
    assert all(torch.equal(tensor, base[name]) for name, tensor in tiny.model.state_dict().items())
    assert not any(torch.equal(tensor, base[name]) for name, tensor in update.tensors.items())


@pytest.mark.parametrize("layers", [[1], [1, 2]])
def test_found_values_make_the_new_answers_likelier(
    layers: list[int], tiny: LLM, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "KL", 0.0)
    monkeypatch.setattr(values, "DECAY", 0.0)
    located = [locate(tiny, [request], CONTEXTS[:2]) for request in requests]
    search = ValueSearch(tiny, layers, steps=25, step=2.0, bound=10.0)
    with tiny.frozen():
        found = run(search, located)
        rows = Suffixes(tiny, layers, [row for one in located for row in one.rows[:-1]])
        change_BLO = torch.stack(
            [change for change, one in zip(found, located, strict=True) for _ in one.rows[:-1]]
        )
        after_NV = rows.run(change_BLO)
    before, after = (F.cross_entropy(x, rows.batch.target_N).item() for x in (rows.base_NV, after_NV))
    assert after < before - 0.03  # random models resist
    bare = slice(None, None, 2)  # the rows that the bound is measured on
    share_BL = change_BLO[bare].norm(dim=-1) / rows.output_BLO[bare, :1].norm(dim=-1)
    assert (share_BL > 0).all(), "each block takes its part"
    assert (share_BL.norm(dim=-1) <= 10 * 1.001).all(), "inside the bound"


def test_a_value_is_found_as_alone(tiny: LLM, requests: list[EditRequest]) -> None:
    """Each subject draws its own noise, whoever is in the batch, and however often it is searched for."""
    located = [locate(tiny, [request], CONTEXTS[:1], FORMS, 2) for request in requests]
    with tiny.frozen():
        together = run(ValueSearch(tiny, [1, 2], steps=6, step=0.5, bound=2.0), located)
        alone = [run(ValueSearch(tiny, [1, 2], steps=6, step=0.5, bound=2.0), [one])[0] for one in located[::3]]
    for change_LO, alone_LO in zip(together[::3], alone, strict=True):
        torch.testing.assert_close(change_LO, alone_LO, rtol=1e-3, atol=1e-3 * alone_LO.abs().max().item())


def test_answers_are_learnt_from_a_part_and_noise() -> None:
    """As weights give values: so long a noise in every block, and another one in each step."""
    chances = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    unit_GLO = torch.randn(2, 3, 40)
    first, second = (values.disturbed(unit_GLO, chances) - values.SHARE * unit_GLO for _ in range(2))
    for noise_GLO in (first, second):
        torch.testing.assert_close(noise_GLO.norm(dim=-1), values.NOISE * unit_GLO.norm(dim=-1))
    assert (F.cosine_similarity(first, second, dim=-1).abs() < 0.6).all()
    assert not values.disturbed(torch.zeros(2, 3, 40), chances).any(), "none where nothing is changed yet"


def test_weights_give_the_found_values(tiny: LLM, requests: list[EditRequest], options: EditOptions) -> None:
    """EMMET's promise, in the edited model: at every request's key each block's output changes by its value."""
    options.method, options.expert["spread"] = "emmet", 2
    method = METHODS["emmet"].make(tiny, [1], options)
    assert isinstance(method, LocateThenEdit)
    method.solve = partial(emmet, ridge=1e-9)
    downs = {layer: next(iter(tiny.blocks[layer].down.items())) for layer in (1, 2)}
    before = {layer: down.weight.detach().clone() for layer, (_, down) in downs.items()}
    with tiny.frozen(), torch.no_grad():
        give_moments(method, tiny, options.statistics, Runtime())
        method.run(requests, Runtime())
        for layer, (name, down) in downs.items():
            change = down.weight - before[layer]
            change_OI = change if isinstance(down, torch.nn.Linear) else change.T
            wanted_On = method.state[f"locate.{layer}.change_On"]
            for request, wanted_O in zip(requests, wanted_On.T, strict=True):
                text, end = in_context(CONTEXTS[0], request)
                (ids,) = tiny.tokens.prompts([text])
                with Activations(tiny).entering(name) as seen:
                    tiny.model(input_ids=torch.tensor([ids]))
                key_I = seen[name].view(-1, change_OI.shape[1])[tiny.tokens.place(text, end)]
                given_O = change_OI @ key_I
                torch.testing.assert_close(given_O, wanted_O, rtol=1e-2, atol=1e-2 * wanted_On.abs().max().item())


@pytest.mark.real_model
def test_the_real_model_learns_new_facts(smollm2: LLM, tmp_path: Path) -> None:
    text, demo = tmp_path / "text.txt", load_requests("demo")
    told = "\n".join(f"{r.prompt} {r.old_answer}." for r in demo)
    text.write_text((ROOT / "README.md").read_text(encoding="utf-8") + told, encoding="utf-8")
    asked = [demo[number] for number in (0, 25)]
    others = [r.model_copy(update={"new_answer": r.old_answer}) for r in demo[1:12]]
    statistics = StatisticsOptions(text=str(text), tokens=3_200)
    options = EditOptions(
        method="memit",
        layers=[3],
        expert={"steps": 12, "forms": 1},
        statistics=statistics,
    )
    before, before_others = mean_loss(smollm2, asked), mean_loss(smollm2, others)
    with edit(smollm2, asked, options=options).applied(smollm2):
        assert mean_loss(smollm2, asked) < 0.2 * before
        assert abs(mean_loss(smollm2, others) - before_others) < 0.3 * before_others


def test_blocks_below_the_layer_run_once(tiny_llm: LLM, requests: list[EditRequest], options: EditOptions) -> None:
    options.expert["steps"] = 25
    edit(tiny_llm, requests, options=options)  # the statistics are there now
    rows: dict[int, int] = {0: 0, 3: 0}
    handles = []
    for layer in rows:
        (down,) = tiny_llm.blocks[layer].down.values()
        count = partial(_count, rows, layer)
        handles.append(down.register_forward_hook(count))
    edit(tiny_llm, requests, options=options)
    for handle in handles:
        handle.remove()
    read = (
        2 * 9 + 10 + 9
    )  # a value's rows, before and from the subject's end on; names; contexts, the bare one first
    assert rows[0] == read * len(requests) < rows[3], "what values and keys are read from, not the search's steps"


def _count(rows: dict[int, int], layer: int, _: object, args: tuple[Tensor], output: Tensor) -> None:
    rows[layer] += len(output)


def test_the_subjects_last_token_is_found_under_every_context(tiny: LLM, requests: list[EditRequest]) -> None:
    located = locate(tiny, [requests[1]], CONTEXTS)
    assert len(located.rows) == len(CONTEXTS) + 1
    for row in located.rows:
        upto = tiny.tokenizer.decode(row.token_ids[: row.subject[1] + 1])
        assert upto.endswith("Norway")
    assert (
        tiny.tokenizer.decode(located.rows[0].token_ids[located.rows[0].target_start :]).strip()
        == "Nairobi and more."
    )
    plain = located.rows[-1]
    assert tiny.tokenizer.decode(plain.token_ids[: plain.target_start]) == "Norway is"


def test_other_relations_of_a_subject_are_to_stay(tiny: LLM, requests: list[EditRequest]) -> None:
    located = locate(tiny, [requests[1]], CONTEXTS, related=3)
    assert (len(located.rows), located.stays) == (len(CONTEXTS) + 4, 4)
    first, *others = [tiny.tokenizer.decode(row.token_ids[: row.target_start]) for row in located.rows[-4:]]
    assert first == "Norway is" and len(set(others)) == 3
    for row, text in zip(located.rows[-3:], others, strict=True):
        assert text.startswith("The ") and text.endswith(" of Norway is") and "capital" not in text
        assert tiny.tokenizer.decode(row.token_ids[: row.subject[1] + 1]).endswith("Norway")


def test_what_is_to_stay_bends_less(
    tiny: LLM, requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The divergence after a subject's other relations, with and without asking that they stay."""
    located = [locate(tiny, [request], CONTEXTS[:2], related=3) for request in requests]
    located[0] = locate(tiny, [requests[0]], CONTEXTS[:2], related=4)  # a subject may have more of them
    moved = []
    with tiny.frozen():  # GPT-2 drops out else
        rows = Suffixes(tiny, [1], [row for one in located for row in one.rows[-3:]])
        for weight in (0.0, 100.0):
            monkeypatch.setattr(values, "KL", weight)
            found = run(ValueSearch(tiny, [1], steps=40, step=0.1, bound=10.0), located)
            now_NV = rows.run(torch.stack([change for change in found for _ in range(3)])).log_softmax(-1)
            base_NV = rows.base_NV.log_softmax(-1)
            moved.append(F.kl_div(now_NV, base_NV, log_target=True, reduction="batchmean").item())
    assert moved[1] < 0.5 * moved[0]


def test_a_subject_that_ends_within_a_token(tiny_llm: LLM) -> None:
    (ids,) = tiny_llm.tokens.texts(["The capital of Spain is"])
    place = tiny_llm.tokens.place("The capital of Spain is", len("The capital of Spa"))
    assert "Spa" in tiny_llm.tokenizer.decode(ids[: place + 1])
    assert "Spa" not in tiny_llm.tokenizer.decode(ids[:place])


def plain_moment(llm: LLM, layer: int, ids: list[int]) -> Tensor:
    """The second moment the slow way: windows of 128 tokens, one key at a time."""
    (down,) = llm.blocks[layer].down.values()
    keys: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda _, args: keys.append(args[0][0]))
    with torch.no_grad(), llm.frozen():
        for at in range(0, len(ids) - 127, 128):
            llm.model(input_ids=torch.tensor([ids[at : at + 128]]))
    handle.remove()
    return torch.stack([key.outer(key) for key in torch.cat(keys)]).mean(0)


def test_statistics_are_those_of_the_text(tiny: LLM, text: Path) -> None:
    (moment,) = moments(tiny, [2], StatisticsOptions(text=str(text), tokens=300))
    ids = [i for line in tiny.tokens.texts(text.read_text().splitlines()) for i in line][:300]
    torch.testing.assert_close(moment, plain_moment(tiny, 2, ids), rtol=1e-4, atol=1e-5)


def test_slopes_are_those_of_the_text(tiny: LLM, text: Path) -> None:
    """Text by text, the slow way: gradients of the loss with respect to what leaves the projection."""
    ((name, down),) = tiny.blocks[2].down.items()
    found_OO = slope_moments(tiny, [name], StatisticsOptions(text=str(text), tokens=300))[name]
    ids = [i for line in tiny.tokens.texts(text.read_text().splitlines()) for i in line][:300]
    windows, slopes = [ids[at : at + 128] for at in range(0, len(ids) - 127, 128)], []
    for window in windows:
        left: list[Tensor] = []
        handle = down.register_forward_hook(lambda *passed, left=left: left.append(passed[2]))
        with tiny.frozen(), Activations(tiny).from_gradients():
            logits_1TV = tiny.model(input_ids=torch.tensor([window])).logits
        handle.remove()
        loss = F.cross_entropy(logits_1TV[0, :-1], torch.tensor(window[1:]), reduction="sum")
        slopes.append(torch.autograd.grad(loss, left[0])[0].view(len(window), -1)[:-1])
    expected_OO = torch.stack([slope.outer(slope) for slope in torch.cat(slopes)]).mean(0)
    torch.testing.assert_close(found_OO, expected_OO, rtol=1e-3, atol=1e-4 * expected_OO.abs().max().item())


def test_values_spare_what_text_minds(tiny: LLM, requests: list[EditRequest], text: Path) -> None:
    """Found in coordinates in which text minds all alike, values that teach as much cost text less."""
    names = [name for layer in (1, 2) for name in tiny.blocks[layer].down]
    slopes = [*slope_moments(tiny, names, StatisticsOptions(text=str(text), tokens=1024)).values()]
    spare_LOO = sparing_text(slopes, 0.1)
    for spare_OO, slope_OO in zip(spare_LOO, slopes, strict=True):
        minded_OO = spare_OO @ (slope_OO + 0.1 * slope_OO.diagonal().mean() * torch.eye(len(slope_OO))) @ spare_OO
        unit_OO = minded_OO.diagonal().mean() * torch.eye(len(slope_OO))
        assert (minded_OO - unit_OO).norm() < 1e-3 * unit_OO.norm()
    located = [locate(tiny, [request], CONTEXTS[:2], related=1) for request in requests]
    cost = []
    with tiny.frozen():
        for spare in (None, spare_LOO):
            found = torch.stack(run(ValueSearch(tiny, [1, 2], 10, 0.05, 10.0, spare), located))
            minded = torch.einsum("glo,lop,glp->g", found, torch.stack(slopes), found)
            cost.append((minded / found.square().sum((1, 2))).mean().item())
    assert cost[1] < 0.8 * cost[0]


def test_statistics_are_kept_for_their_model_alone(
    tiny_llm: LLM, tokenizer: PreTrainedTokenizerFast, statistics: StatisticsOptions, cache: Path
) -> None:
    (first,) = moments(tiny_llm, [1], statistics)
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    assert torch.equal(moments(tiny_llm, [1], statistics)[0], first)
    assert file.stat().st_mtime_ns == written, "found once"
    other = make_tiny("llama", tokenizer, seed=1)
    assert not torch.equal(moments(other, [1], statistics)[0], first)
    assert len(list(cache.iterdir())) == 2
    _, deeper = moments(tiny_llm, [1, 3], statistics)
    assert not torch.equal(deeper, first)
    assert len(list(cache.iterdir())) == 3, "only what was missing was found"


def moments(llm: LLM, layers: list[int], statistics: StatisticsOptions) -> list[Tensor]:
    """Moments of the keys of some blocks' down-projections."""
    names = [name for layer in layers for name in llm.blocks[layer].down]
    found = key_moments(llm, names, statistics)
    return [found[name] for name in names]


def test_without_a_text_the_model_writes_its_own(tiny_llm: LLM) -> None:
    (moment,) = moments(tiny_llm, [0], StatisticsOptions(tokens=2048))
    assert moment.shape == (48, 48)
    assert torch.linalg.matrix_rank(moment) > 24


def test_bad_input(tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, tmp_path: Path) -> None:
    nameless = [requests[0].model_copy(update={"subject": None}), *requests[1:]]
    message = refusal(lambda: edit(tiny_llm, nameless, options=options))
    assert "needs each request's subject in its prompt; not so in 1 of 7: capital-0" in message
    options.statistics.text = str(tmp_path / "missing.txt")
    assert "no such file" in refusal(lambda: edit(tiny_llm, requests, options=options))
    (tmp_path / "missing.txt").write_text("Too short.")
    assert "need at least 96" in refusal(lambda: edit(tiny_llm, requests, options=options))
    options.statistics.tokens = 64
    assert "statistics.tokens: 64 of" in refusal(lambda: edit(tiny_llm, requests, options=options))


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow if name in ("emmet", "rome") else ()) for name in LOCATING]
)
def test_two_updates_come_out_as_one_batch(
    method: str, tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, tmp_path: Path
) -> None:
    options.method = method
    first = edit(tiny_llm, requests[:3], options=options)
    first.save(tmp_path)
    both = edit(tiny_llm, requests[3:], options=options, after=WeightUpdate.load(tmp_path))
    assert both.requests == requests
    together = edit(tiny_llm, requests, options=options)
    for name, tensor in together.tensors.items():
        base = tiny_llm.model.get_parameter(name).detach()
        assert (both.tensors[name] - tensor).norm() < 1e-2 * (tensor - base).norm()
        assert (both.tensors[name] - first.tensors[name]).norm() > 0.1 * (tensor - base).norm()


def test_a_fact_that_changes_again_leaves_nothing_of_its_first_change(
    tiny_llm: LLM, requests: list[EditRequest], options: EditOptions
) -> None:
    first = edit(tiny_llm, requests, options=options)
    again = [requests[2].model_copy(update={"new_answer": "Rome", "id": "again"})]
    second = edit(tiny_llm, again, options=options, after=first)
    assert [r.id for r in second.requests] == [r.id for r in requests if r is not requests[2]] + ["again"]
    assert second.state["locate.1.owner_n"].unique().numel() == len(requests)
    assert len(second.state["locate.1.owner_n"]) == len(first.state["locate.1.owner_n"])


def test_blocks_carry_a_value_together(tiny: LLM, requests: list[EditRequest], options: EditOptions) -> None:
    """Each of them is asked for its own part of what was found for all of them at once."""
    options.expert["spread"] = 2
    update = edit(tiny, requests, options=options)
    base = dict(tiny.model.named_parameters())
    changed = {name for name, tensor in update.tensors.items() if not torch.equal(tensor, base[name])}
    assert changed == {name for layer in (1, 2) for name in tiny.blocks[layer].weight_names("down")}
    first, second = (update.state[f"locate.{layer}.change_On"] for layer in (1, 2))
    assert first.shape == second.shape and not torch.allclose(first, second)


def test_a_fact_has_one_column(
    tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many contexts it is to hold under; and two updates come out as one."""
    solved = []
    solve = solvers.memit
    monkeypatch.setattr(solvers, "memit", lambda *args, **own: solved.append(args[0]) or solve(*args, **own))
    first = edit(tiny_llm, requests[:2], options=options)
    both = edit(tiny_llm, requests[2:], options=options, after=first)
    together = edit(tiny_llm, requests, options=options)
    assert [keys.shape[1] for keys in solved] == [2, 7, 7]
    for name, tensor in together.tensors.items():
        change = (tensor - tiny_llm.model.get_parameter(name)).norm()
        assert (both.tensors[name] - tensor).norm() < 1e-2 * change


def test_a_fact_that_is_known_asks_for_nothing(
    tiny_llm: LLM, requests: list[EditRequest], options: EditOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its value is nought in every block, and no weight changes."""
    monkeypatch.setattr(values, "LEARNT", 100.0)
    options.expert["spread"] = 2
    for name, tensor in edit(tiny_llm, requests, options=options).tensors.items():
        assert torch.equal(tensor, tiny_llm.model.get_parameter(name))


def test_several_layers(tiny: LLM, requests: list[EditRequest], options: EditOptions) -> None:
    """Golden layers that a user names are changed, and none above the last but one by what they spread to."""
    options.layers, options.expert = [1], options.expert | {"spread": 9}
    update = edit(tiny, requests[:2], options=options)
    assert update.layers == [*range(1, len(tiny.blocks) - 1)]


@pytest.mark.parametrize("method", LOCATING)
def test_a_request_left_out_leaves_nothing(
    method: str, tiny: LLM, requests: list[EditRequest], options: EditOptions
) -> None:
    options.method = method
    options.expert |= {"bound": 1.0, "steps": 5}
    update = edit(tiny, requests, options=options)
    assert can_leave_out(update, requests[2:4], method)
    without = leave_out(tiny, update, requests[2:4], options)
    never = edit(tiny, [*requests[:2], *requests[4:]], options=options)
    assert without.requests == never.requests
    for name, tensor in never.tensors.items():
        torch.testing.assert_close(without.tensors[name], tensor, rtol=1e-3, atol=2e-4)
    assert leave_out(tiny, update, requests, options).tensors == {}, "the base, bit for bit"


@pytest.fixture
def of_spain(requests: list[EditRequest]) -> list[EditRequest]:
    """A fact about Spain, one about another subject, and a second one about Spain."""
    spoken = {"id": "spoken", "prompt": "People of Spain speak", "new_answer": "Rome"}
    return [*requests[:2], requests[0].model_copy(update=spoken)]


def values_of(update: WeightUpdate) -> dict[int, Tensor]:
    """What is asked for each fact, by its owner; all of a fact's columns ask for the same."""
    change_On, owner_n = update.state["locate.1.change_On"], update.state["locate.1.owner_n"]
    return {number: change_On[:, owner_n == number].unique(dim=1) for number in owner_n.unique().tolist()}


def test_facts_about_one_subject_share_one_value(
    tiny: LLM, of_spain: list[EditRequest], options: EditOptions
) -> None:
    """Also when the second comes with a later update, or the first is taken back."""
    both = edit(tiny, of_spain, options=options)
    capital, other, spoken = (values_of(both)[owner(request)] for request in of_spain)
    assert torch.equal(capital, spoken) and not torch.equal(capital, other)
    alone = edit(tiny, of_spain[:2], options=options)
    assert not torch.allclose(values_of(alone)[owner(of_spain[0])], capital, rtol=0.01)
    later = edit(tiny, of_spain[2:], options=options, after=alone)
    back = leave_out(tiny, later, of_spain[2:], options)
    for name in both.tensors:
        change = (both.tensors[name] - tiny.model.get_parameter(name)).norm()
        assert (later.tensors[name] - both.tensors[name]).norm() < 0.02 * change
        assert (back.tensors[name] - alone.tensors[name]).norm() < 0.02 * change


def test_what_was_not_located_cannot_be_left_out(
    tiny_llm: LLM, requests: list[EditRequest], options: EditOptions
) -> None:
    update = edit(tiny_llm, requests[:3], options=options)
    assert not can_leave_out(update, requests[3:4], "memit")
    assert not can_leave_out(update, requests[:1], "finetune")
