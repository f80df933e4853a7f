"""The adapter's README says what it is and how it is served, and nothing in it is what a stranger made of it."""

import shlex

import pytest
import yaml
from huggingface_hub import ModelCard
from page_reports import gsm8k, small
from report_fixtures import ADAPTER, COMMIT, DATA, MODEL, SHA256

from job.core.data.report_data import DataObject
from job.core.judging.judged_answers import Gain, MetricReport, SliceGain, SourceGain
from job.core.judging.slices import SliceLoss, SliceName
from job.core.reports.export import Export, ExportLosses, limits_of
from job.core.reports.report import AdapterFile
from job.render.cards.adapter import adapter_card
from job.render.cards.merged import merged_card

EVIL = "x`\n---\n# Heading <script>alert(1)</script> | \x1b[2J \u202e"
RECIPE = {
    "data": {"train": ["s3://notes/train.jsonl"], "prompt": "{q}", "completion": "{a}", "chat": None},
    "lora": {"r": 24, "alpha": 8, "dropout": 0.0, "targets": ["q_proj", "lm_head"]},
    "train": {"steps": 100, "epochs": None, "batch_size": 8, "learning_rate": 2e-4, "optimizer": "adamw_8bit"},
}


def card(**changes):
    return adapter_card(small(**{"recipe": RECIPE, **changes}))


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def with_files(*names):
    files = dict.fromkeys(("adapter_model.safetensors", *names), AdapterFile(size=1, sha256=SHA256))
    return ADAPTER.model_copy(update={"files": files})


def served(text):
    return shlex.split(next(line for line in text.split("\n") if line.startswith("vllm ")))


def test_its_front_matter_is_read_by_the_hub_s_own_library():
    read = ModelCard(card()).data

    assert (read.base_model, read.license, read.library_name) == ("owner/name", "apache-2.0", "peft")
    assert read.pipeline_tag == "text-generation"
    assert read.get("base_model_relation") == "adapter"
    measured = {each.metric_type: (each.metric_value, each.metric_args) for each in read.eval_results}
    assert measured == {
        "loss": (1.25, {"examples": 120, "tokens": 1200}),
        "perplexity": (pytest.approx(2.7**1.25, abs=1e-5), {"examples": 120, "tokens": 1200}),
        "accuracy": (0.5, {"examples": 120, "tokens": 1200}),
        "exact_match": (0.95, {"examples": 60}),
    }
    assert {each.dataset_split for each in read.eval_results} == {"validation"}


@pytest.mark.parametrize(
    ("licence", "named"),
    [
        ("llama2", {"license": "llama2"}),
        ("mit, apache-2.0", {"license": ["mit", "apache-2.0"]}),
        ("Own Licence 1.0", {"license": "other", "license_name": "own-licence-1.0"}),
        ("see LICENSE.txt", {"license": "other"}),
        (None, {}),
    ],
)
def test_the_licence_is_one_that_the_hub_knows_or_other(licence, named):
    found = front(card(model=MODEL.model_copy(update={"licence": licence})))
    link = {"license_link": "https://huggingface.co/owner/name"} if named.get("license") == "other" else {}

    assert {name: value for name, value in found.items() if name.startswith("license")} == named | link


def test_a_base_that_is_not_on_the_hub_is_no_base_model_there():
    """It refuses a card with one."""
    text = card(model=MODEL.model_copy(update={"base": "s3://models/base"}))

    assert "base_model" not in front(text)
    assert "# LoRA adapter for `s3://models/base`" in text
    assert 'from_pretrained("path/to/base", dtype' in text
    assert served(text)[:3] == ["vllm", "serve", "path/to/base"]


def test_data_sets_of_the_hub_are_those_that_the_recipe_names_so():
    """Whatever else a source is called would be somebody else's data set there."""
    named = [{"uri": "s3://notes/a", "name": "openai/gsm8k"}, {"uri": "s3://notes/b", "name": "notes"}]

    assert front(card(recipe=RECIPE | {"data": {"train": named}}))["datasets"] == ["openai/gsm8k"]
    assert "datasets" not in front(card())


def test_it_says_what_loads_the_base():
    assert "base = AutoModelForCausalLM.from_pretrained(" in card()
    assert f'revision="{COMMIT}")' in card()
    whole = card(model=MODEL.model_copy(update={"left_out": "a tower of pictures"}))
    assert "import AutoModelForImageTextToText, Auto" in whole
    assert "base = AutoModelForImageTextToText.from_pretrained(" in whole
    assert "- Not adapted: `a tower of pictures`" in whole


def test_a_base_in_mxfp4_is_loaded_by_what_decodes_it():
    """transformers refuses to put into 4 bits of bitsandbytes what is in other ones."""
    text = card(model=MODEL.model_copy(update={"in_mxfp4": True}))
    assert "Mxfp4Config(dequantize=True)" in text
    assert "BitsAndBytesConfig" not in text
    assert f'quantization_config=bf16, revision="{COMMIT}")' in text


def test_the_lines_for_servers_name_the_files_that_stand_beside_it():
    plain = ["vllm", "serve", "owner/name", "--revision", COMMIT, "--enable-lora", "--max-lora-rank", "32"]
    plain += ["--lora-modules", "tuned=path/to/adapter"]
    assert served(card()) == plain
    assert 'AutoTokenizer.from_pretrained("owner/name", revision=' in card()
    assert "/v1/completions" in card()
    chats = {**RECIPE, "data": {"train": [], "chat": "messages"}}
    files = with_files("chat_template.jinja", "generation_config.json", "tokenizer_config.json")
    text = card(recipe=chats, adapter=files)
    added = ["--chat-template", "path/to/adapter/chat_template.jinja", "--generation-config", "path/to/adapter"]
    assert served(text) == plain + added
    assert 'AutoTokenizer.from_pretrained("path/to/adapter")' in text
    assert "`chat_template.jinja` and `generation_config.json` differ from the base's own" in text
    assert "/v1/chat/completions" in text


def test_a_server_that_refuses_it_has_no_line():
    text = card(adapter=ADAPTER.model_copy(update={"refused_by": ("vLLM refuses adapters of a rank above 512",)}))

    assert "vllm serve" not in text
    assert "vLLM refuses adapters of a rank above 512." in text


def test_its_tables_have_each_evaluation_and_hyper_parameter():
    text = card()

    assert "| 0 | 2.5000 | - | 11.98 | 50.0% |" in text
    assert "| 50 (this adapter) | 1.2500 |" in text
    assert "of 60 held-out questions: 0.0% (base) → 95.0%." in text
    assert "| lora.targets | `q_proj, lm_head` |" in text
    assert "| train.learning_rate | `0.0002` |" in text
    assert "train.epochs" not in text


SURE = Gain(examples=400, before=0.125, after=0.5, gain=0.375, low=0.3275, high=0.42)
FEW = Gain(examples=12, before=0.5, after=0.25, gain=-0.25)


def test_its_metric_is_in_the_model_index_with_n_and_interval_and_in_the_text_by_slice():
    german = SliceName(field="lang", value="de")
    metric = MetricReport(
        name="pattern",
        pattern="#### ([0-9]+)",
        max_new_tokens=256,
        scores=SURE,
        sources=(SourceGain(name="new", scores=FEW), SourceGain(name="old", scores=None)),
        slices=(SliceGain(slice=german, scores=FEW),),
    )
    judged = tuple(
        each.model_copy(
            update={"slices": (SliceLoss(slice=german, examples=7, tokens=70, loss=each.loss + 1, plus_minus=None),)}
        )
        for each in small().evaluations
    )
    text = card(metric=metric, evaluations=judged)
    found = {each.metric_type: each for each in ModelCard(text).data.eval_results}

    assert found["pattern"].metric_value == 0.5
    assert found["pattern"].metric_name == "Match of the pattern (n = 400)"
    interval = {"gain_low": 0.3275, "gain_high": 0.42}
    assert found["pattern"].metric_args == {"examples": 400, "base": 0.125, "gain": 0.375} | interval
    assert found["exact_match"].metric_value == 0.95
    assert "What `#### ([0-9]+)` finds in an answer, compared with the learned answer: 12.5% → 50.0% of 400" in text
    assert "| source `new` | 12 | 50.0% | 25.0% | -25.0 | - |" in text
    assert "| source `old` | 0 | - | - | - | - |" in text
    assert "| `lang` `de` | 12 | 50.0% | 25.0% | -25.0 | - |" in text
    assert "| `lang` `de` | 7 | 3.5000 | 2.2500 |" in text


def test_exact_match_stands_there_once_and_a_field_s_match_is_another():
    metric = MetricReport(name="exact_match", max_new_tokens=256, scores=SURE)
    text = card(metric=metric)
    assert [e.metric_value for e in ModelCard(text).data.eval_results if e.metric_type == "exact_match"] == [0.5]
    assert "held-out questions" not in text
    of_field = metric.model_copy(update={"field": EVIL})
    text = card(metric=of_field)
    both = [e for e in ModelCard(text).data.eval_results if e.metric_type == "exact_match"]
    assert [each.metric_value for each in both] == [0.95, 0.5]
    assert both[1].metric_name.startswith("Exact match of x`")
    assert not any(line.startswith(("# Heading", "---", "<script")) for line in text.split("---\n", 2)[2].split("\n"))
    rouge = metric.model_copy(update={"name": "rouge_l"})
    assert any(each.metric_type == "rouge" for each in ModelCard(card(metric=rouge)).data.eval_results)


def exported_card(**changes):
    report = small(**{"recipe": RECIPE, **changes})
    losses = ExportLosses(examples=60, of_examples=120, tokens=700, merged=1.26, unmerged=1.26, reported=1.25, base=2.5)
    export = Export(
        run_uri=report.run_uri,
        step=50,
        adapter_sha256=SHA256,
        base=report.model.base,
        revision=report.model.revision,
        onto="weights",
        dtype="BF16",
        quantised_base=False,
        untied=False,
        eos_token_id=(2,),
        losses=losses,
        limits=limits_of(losses, "weights"),
        files={},
        versions={},
    )
    return merged_card(export, report)


def test_a_merged_model_s_card_has_the_same_front_matter_with_its_own_loss_alone():
    read = ModelCard(exported_card()).data

    assert (read.base_model, read.license, read.library_name) == ("owner/name", "apache-2.0", "transformers")
    assert read.get("base_model_relation") == "finetune"
    measured = {each.metric_type: (each.metric_value, each.metric_args) for each in read.eval_results}
    assert measured == {"loss": (1.26, {"examples": 60, "tokens": 700})}
    elsewhere = MODEL.model_copy(update={"base": "s3://models/base", "licence": "Own Licence 1.0"})
    found = front(exported_card(model=elsewhere))
    assert "base_model" not in found
    assert (found["license"], found["license_name"]) == ("other", "own-licence-1.0")


def test_a_long_run_has_a_short_table_with_the_chosen_step_in_it():
    report = gsm8k()
    judged = [row for row in adapter_card(report).split("\n") if row.startswith("| ") and "%" in row and "±" in row]

    assert len(judged) <= 13
    assert sum("(this adapter)" in row for row in judged) == 1


def test_thousands_of_objects_are_counted_and_not_listed():
    objects = tuple(DataObject(uri=f"s3://n/{n}", etag="e", version=None, size=1, sha256=SHA256) for n in range(3000))
    data = DATA.model_copy(update={"train": DATA.train.model_copy(update={"objects": objects})})

    assert "- and 2,951 more, which `report.json` names" in card(data=data)
    assert len(card(data=data)) < 20_000


@pytest.mark.parametrize("name", ["base", "revision", "licence", "quantisation", "left_out"])
def test_what_a_stranger_named_is_code_on_one_line(name):
    text = card(model=MODEL.model_copy(update={name: EVIL}))

    head, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert {"library_name", "model-index"} <= set(yaml.safe_load(head))
    assert head.isascii()
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert next(line for line in body.split("\n") if line.startswith("#")).startswith("# LoRA adapter for `")
    assert not any(line.startswith(("# Heading", "---", "<script")) for line in body.split("\n"))


def test_what_a_stranger_named_stays_in_its_cell():
    text = card(recipe={**RECIPE, "lora": {"r": 8, "targets": [EVIL]}}, run_id=EVIL)
    row = next(line for line in text.split("\n") if line.startswith("| lora.targets"))

    assert row.replace(r"\|", "").count("|") == 3
    assert ModelCard(text).data.eval_results
