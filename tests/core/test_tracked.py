"""What trackers hear: the recipe flat, the figures by name, an id that is a run's and nobody else's."""

from page_reports import small

from job.core.tracked import tracked_figures, tracked_key, tracked_recipe


def test_a_recipe_is_flat_and_what_is_not_set_is_left_out():
    recipe = {
        "model": {"base": "owner/name", "revision": None},
        "lora": {"r": 8, "dropout": 0.0, "targets": ["q_proj", "v_proj"]},
        "store": {"checksums": True},
        "data": {"chat_template": "x" * 9000},
    }

    assert tracked_recipe(recipe) == {
        "model.base": "owner/name",
        "lora.r": 8,
        "lora.dropout": 0.0,
        "lora.targets": "q_proj, v_proj",
        "store.checksums": True,
        "data.chat_template": "x" * 500,
    }


def test_the_figures_are_the_report_s():
    figures = tracked_figures(small())

    assert figures["final/validation_loss"] == 1.25
    assert figures["final/validation_loss_base"] == 2.5
    assert figures["final/exact_match"] == 0.95
    assert "final/exact_match" not in tracked_figures(small(exact_match=None))


def test_the_same_run_id_in_two_outputs_is_two_tracked_runs():
    here, there = tracked_key("ab-cd", "s3://a/runs/ab-cd"), tracked_key("ab-cd", "s3://b/runs/ab-cd")

    assert here != there
    assert here == tracked_key("ab-cd", "s3://a/runs/ab-cd")
    assert here.startswith("ab-cd-")
    assert len(tracked_key("x" * 64, "s3://a")) <= 128
