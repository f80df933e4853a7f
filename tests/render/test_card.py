"""The adapter's README says what it is, and nothing in it is what a stranger made of it."""

import pytest
import yaml

from job.core.recipe import LoraSection
from job.render.card import Card, adapter_card

EVIL = "x`\n---\n# Heading <script>alert(1)</script> \x1b[2J"


@pytest.fixture
def card_of(report):
    def made(**values):
        return adapter_card(
            Card(
                **{
                    "run_id": "ab12",
                    "base": "someone/tiny",
                    "revision": "0" * 40,
                    "licence": "apache-2.0",
                    "is_multimodal": False,
                    "form": "NF4, double quantisation; 14 linear layers in 4 bits, 1 not (lm_head)",
                    "data": report.data,
                    "lora": LoraSection(r=4, alpha=8),
                    "step": 5,
                    "steps": 10,
                    "base_loss": 2.0,
                    "tuned_loss": 1.0,
                    **values,
                }
            )
        )

    return made


def test_it_says_where_the_adapter_is_from(card_of):
    text = card_of()

    assert yaml.safe_load(text.split("---")[1])["base_model"] == "someone/tiny"
    assert "# LoRA adapter for `someone/tiny`" in text
    assert 'from_pretrained("someone/tiny"' in text
    assert f'revision="{"0" * 40}"' in text


def test_it_says_what_loads_the_base(card_of):
    assert "base = AutoModelForCausalLM.from_pretrained(" in card_of()
    whole = card_of(is_multimodal=True)
    assert "import AutoModelForImageTextToText, Bits" in whole
    assert "base = AutoModelForImageTextToText.from_pretrained(" in whole


def test_a_base_in_mxfp4_is_loaded_by_what_decodes_it(card_of):
    """transformers refuses to put into 4 bits of bitsandbytes what is in other ones."""
    text = card_of(in_mxfp4=True)
    assert "Mxfp4Config(dequantize=True)" in text
    assert "BitsAndBytesConfig" not in text
    assert f'quantization_config=bf16, revision="{"0" * 40}")' in text


@pytest.mark.parametrize("name", ["base", "revision", "licence"])
def test_what_a_stranger_named_is_code_on_one_line(card_of, name):
    text = card_of(**{name: EVIL})

    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert set(yaml.safe_load(front)) == {"base_model", "library_name", "tags"}
    assert "\x1b" not in text
    assert next(line for line in body.split("\n") if line.startswith("#")).startswith("# LoRA adapter for `")
    assert not any(line.startswith(("# Heading", "---")) for line in body.split("\n"))
