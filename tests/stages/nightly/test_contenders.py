"""Models on exams: kept results of the same model are used, others are not; smaller forwards where memory runs out."""

import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from channel_material import adapter
from tiny import CPU, adapted, stages_attempt
from tiny_families import write_family

from job.core.errors import DataError, PeerLostError
from job.core.judging.answer_metrics import AnswerMetric
from job.core.recipe.schema import LoraSection, Recipe
from job.edge.run.channels import Channel
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store
from job.stages.nightly import contenders
from job.stages.nightly.answering import Asked, answers_known
from job.stages.nightly.contenders import Contender, Examiner
from job.stages.nightly.exams import Exams, ExamSet, _exam
from job.tune.device.compute_dtype import compute_dtype
from job.tune.loop.checkpoint import adapter_to_publish
from job.tune.loop.evaluate import Question, evaluate
from job.tune.model.adapter import odd_settings
from job.tune.world import ALONE


@pytest.fixture
def examiner(bases, documents, tmp_path):
    recipe = Recipe.model_validate(
        {
            "model": {"base": str(bases["llama"])},
            "data": {"train": "t.jsonl", "validation": "v.jsonl", "text": "{q}"},
            "lora": {"r": 4},
            "train": {"steps": 1, "batch_size": 1, "learning_rate": 1e-3},
            "output": "o",
            "promote": {"channel": "notes"},
        }
    )
    channel = Channel(open_store(f"file://{tmp_path}/store", StoreSettings()), "notes", conditional=True)
    identity = SimpleNamespace(source="base", revision="c" * 40)
    inputs = SimpleNamespace(
        base=SimpleNamespace(folder=bases["llama"], identity=identity),
        device=CPU,
        placement="replicated",
        artifacts=SimpleNamespace(run_id="run-2"),
    )
    exams = Exams(
        frozen=ExamSet(exam=_exam(documents, [], cluster_by=None, slice_by=()), documents=documents),
        regression=None,
    )
    return Examiner(
        stages_attempt(recipe, tmp_path),
        inputs,
        channel,
        exams,
        left_to_peft=False,
        rows="packed",
        tokens_at_once=4096,
        world=ALONE,
    )


def scored(model, documents):
    return evaluate(
        model, documents, step=0, tokens_at_once=4096, should_stop=lambda: False, on_progress=lambda _done: None
    ).nll


def test_the_base_is_what_an_adapter_is_that_was_never_trained(examiner, bases, documents):
    """Its results are kept, and the second time nothing is loaded."""
    (results,) = examiner.results(Contender(run_id=None, adapter=None)).values()
    untrained = adapted(bases["llama"], LoraSection(r=4), dtype=compute_dtype(CPU)).eval()
    assert results.nll == pytest.approx(scored(untrained, documents).tolist(), abs=1e-3)

    examiner.loaded = None
    assert [*examiner.results(Contender(run_id=None, adapter=None)).values()] == [results]


def test_results_of_another_model_under_the_same_name_are_not_used(examiner, bases, documents):
    mine = Contender(run_id="run-1", adapter=adapter("run-1", "a"))
    model = adapted(bases["llama"], LoraSection(r=4), dtype=compute_dtype(CPU), moved=True).eval()
    (kept,) = examiner.of_loaded(mine, model, known={}).values()
    assert kept.nll == tuple(scored(model, documents))
    assert [*examiner.results(mine).values()] == [kept]

    def refuse(_contender):
        raise LookupError("it is loaded")

    examiner.loaded = refuse
    with pytest.raises(LookupError):
        examiner.results(Contender(run_id="run-1", adapter=adapter("run-1", "b")))
    examiner.how = "another device"
    with pytest.raises(LookupError):
        examiner.results(mine)


def test_results_are_kept_for_the_same_code_layers_and_rows_alone(examiner, documents, bases, monkeypatch, tmp_path):
    """Before training linear layers are PEFT's own and rows are found; after it both are those of the training."""
    mine = Contender(run_id="run-1", adapter=adapter("run-1"))
    known = {examiner.exams.frozen.exam.name: np.ones(len(documents))}
    examiner.of_loaded(mine, None, known=known)

    def another(*, left_to_peft=False, rows="packed"):
        these = Examiner(
            examiner._attempt,
            examiner._inputs,
            examiner._channel,
            examiner.exams,
            left_to_peft=left_to_peft,
            rows=rows,
            tokens_at_once=4096,
            world=ALONE,
        )
        return these._kept(mine, examiner.exams.frozen)

    assert another() is not None
    assert another(left_to_peft=True) is None
    assert another(rows=None) is None
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "linear.py").write_text("# another kernel")
    monkeypatch.setattr(contenders.job, "__path__", [str(tmp_path)])
    assert another() is None


def test_what_was_judged_just_now_is_not_judged_again(examiner, documents):
    known = {examiner.exams.frozen.exam.name: np.arange(1.0, len(documents) + 1)}
    (kept,) = examiner.of_loaded(Contender(run_id="run-2", adapter=adapter("run-2")), None, known=known).values()
    assert kept.nll == tuple(range(1, len(documents) + 1))


def question(document):
    return Question(ids=(5, 6, 7 + document), prompt="?", expected="right", document=document)


def asking(*documents, name="questions"):
    metric = AnswerMetric(name="contains")
    asked = tuple(map(question, documents))
    return Asked(name=name, questions=asked, references=dict.fromkeys(documents, "right"), metric=metric)


@pytest.fixture
def answering(examiner, monkeypatch):
    """The examiner with two questions, and what was asked: the model's text is its own, the loading is not."""
    asked = []

    def answers_of(_attempt, _inputs, questions, model):
        asked.append((questions.name, model))
        return questions.judged({4: "it is right", 1: "not so"})

    @contextmanager
    def loaded(contender):
        yield contender.called

    monkeypatch.setattr(contenders, "answers_of", answers_of)
    monkeypatch.setattr(contenders, "evaluate", lambda _model, these, **_how: SimpleNamespace(nll=np.ones(len(these))))
    examiner.loaded = loaded
    examiner.exams = replace(examiner.exams, asked=asking(4, 1))
    examiner.asked_so_far = asked
    return examiner


def test_a_model_is_asked_once_and_what_it_answered_is_kept(answering, documents):
    run_1 = Contender(run_id="run-1", adapter=adapter("run-1"))
    (mute,) = answering.results(run_1).values()
    assert mute.answers is None
    assert answering.asked_so_far == [], "earlier models are compared by their loss alone"
    (kept,) = answering.results(run_1, with_answers=True).values()
    assert (kept.answers.places, kept.answers.wrong) == ((4, 1), (0.0, 1.0))
    assert kept.answers.texts == ("it is right", "not so")
    assert kept.nll == mute.nll
    assert [*answering.results(run_1, with_answers=True).values()] == [kept]
    assert answering.asked_so_far == [("questions", "run-1")]


def test_answers_to_other_questions_are_asked_anew_and_to_none_are_left_out(answering):
    run_1 = Contender(run_id="run-1", adapter=adapter("run-1"))
    answering.results(run_1, with_answers=True)
    answering.exams = replace(answering.exams, asked=asking(1, 4, name="others"))
    (kept,) = answering.results(run_1, with_answers=True).values()
    assert (kept.answers.asked, kept.answers.wrong) == ("others", (1.0, 0.0))
    answering.exams = replace(answering.exams, asked=None)
    (kept,) = answering.results(run_1, with_answers=True).values()
    assert kept.answers is None, "the run of tonight has none either"
    assert [name for name, _ in answering.asked_so_far] == ["questions", "others"]


def test_what_the_run_has_answered_already_is_not_asked_again(answering, documents):
    known = {answering.exams.frozen.exam.name: np.ones(len(documents))}
    questions = [question(7), question(1), replace(question(0), document=None), question(4)]
    answers = answers_known(answering.exams.asked, questions, ["of another", "right", "a prompt's", "wrong"])
    mine = Contender(run_id="run-2", adapter=adapter("run-2"))
    answering.of_loaded(mine, None, known=known, answers=answers)
    (kept,) = answering.results(mine, with_answers=True).values()
    assert (kept.answers.places, kept.answers.wrong) == ((4, 1), (1.0, 0.0))
    assert answering.asked_so_far == []


def test_memory_that_runs_out_makes_the_forwards_smaller_and_not_the_night_fail(examiner, documents, monkeypatch):
    asked = []

    def short(_model, these, *, tokens_at_once, **_others):
        asked.append(tokens_at_once)
        if tokens_at_once > 1000:
            raise torch.OutOfMemoryError
        return SimpleNamespace(nll=np.ones(len(these)))

    monkeypatch.setattr(contenders, "evaluate", short)
    nll = examiner.nll(Contender(run_id=None, adapter=None), None, documents)
    assert nll.tolist() == [1.0] * len(documents)
    assert asked == [4096, 2048, 1024, 512]


def test_a_loss_that_is_not_finite_names_the_record(examiner, documents, monkeypatch):
    odd = np.ones(len(documents))
    odd[2] = np.nan
    monkeypatch.setattr(contenders, "evaluate", lambda *_, **__: SimpleNamespace(nll=odd))
    with pytest.raises(DataError, match=documents.where(2)):
        examiner.nll(Contender(run_id=None, adapter=None), None, documents)


def test_an_adapter_on_experts_is_one_that_we_write(tmp_path):
    lora = LoraSection(r=4, targets=["all-linear", "experts"])
    model = adapted(write_family(tmp_path / "base", "qwen3_moe"), lora, dtype=compute_dtype(CPU)).model
    adapter_to_publish(model, None).write(saved(model, tmp_path), tmp_path / "published")
    config = tmp_path / "published" / "adapter_config.json"
    assert json.loads(config.read_text())["target_parameters"]
    assert odd_settings(config) == []


def test_shards_are_let_go_before_the_next_model_also_where_one_has_no_finite_loss(examiner, monkeypatch):
    """The others wait with them, and would answer another order than the next one."""
    let_go = []
    monkeypatch.setattr(contenders, "let_go", lambda model, _world: let_go.append(model))
    with examiner.loaded(Contender(run_id=None, adapter=None)) as model:
        assert not let_go
    assert let_go == [model]
    with pytest.raises(DataError), examiner.loaded(Contender(run_id=None, adapter=None)):
        raise DataError("no finite loss")
    assert len(let_go) == 2


def test_settings_that_peft_would_obey_and_we_never_write_are_refused(bases, tmp_path):
    """The hashes that an adapter is verified by stand in the bucket that it comes from."""
    model = adapted(bases["llama"], LoraSection(r=4, dropout=0.1), dtype=compute_dtype(CPU)).model
    adapter_to_publish(model, None).write(saved(model, tmp_path), tmp_path / "published")
    config = tmp_path / "published" / "adapter_config.json"
    assert odd_settings(config) == []
    run_1 = Contender(run_id="run-1", adapter=adapter("run-1"))
    contenders._refuse_odd(config, run_1)

    content = json.loads(config.read_text())
    for odd in (
        {"auto_mapping": {"parent_library": "os"}},
        {"peft_type": "IA3"},
        {"modules_to_save": ["x"]},
        {"new": 1},
    ):
        config.write_text(json.dumps(content | odd))
        assert odd_settings(config) == [*odd]
        with pytest.raises(DataError, match=f"does not write \\({next(iter(odd))}\\)"):
            contenders._refuse_odd(config, run_1)
    config.write_text("[]")
    with pytest.raises(DataError, match="cannot be read"):
        contenders._refuse_odd(config, run_1)


def saved(model, folder):
    model.save_pretrained(folder / "saved", save_embedding_layers=False)
    return folder / "saved" / "adapter_model.safetensors"


def test_what_was_computed_from_a_broken_off_sum_is_not_kept(examiner, documents, monkeypatch):
    """Of a base that is sharded, where a follower is gone: later nights would take it for this model's."""
    monkeypatch.setattr(examiner, "_world", SimpleNamespace(broken_off=True))
    kept = []
    monkeypatch.setattr(examiner._channel, "keep_results", lambda *what: kept.append(what))
    with pytest.raises(PeerLostError, match="broken off"):
        examiner.keep(Contender(run_id=None, adapter=None), examiner.exams.frozen, [1.0] * len(documents))
    assert not kept
