"""A merged model's README: what it was made of, how good it is, under which licence; with front matter for hubs."""

from job.core.reports.export import Export
from job.core.reports.report import Report
from job.core.visible import code_span
from job.render.cards.front_matter import front_matter, measured


def merged_card(export: Export, report: Report) -> str:
    """README.md, in Markdown. What the adapter's answers scored is not said of this model: it has not answered."""
    losses, licence = export.losses, report.model.licence
    loss = measured(
        "loss", "Validation loss, nats a token", losses.merged, examples=losses.examples, tokens=losses.tokens
    )
    front = front_matter(report, library="transformers", relation="finetune", tags=("qlora", "merged"), metrics=[loss])
    onto = "its own weights" if export.onto == "weights" else "its weights as they are in 4 bits"
    said = code_span(licence) if licence else "not known; look at the base model"
    return f"""{front}# {code_span(export.base)}, fine-tuned

The adapter of run {code_span(report.run_id)}, step {export.step}, merged into {onto}.

- Base: {code_span(export.base)}, revision {code_span(export.revision)}
- Licence of the base: {said}. It holds for what is made from the base too.
- Trained on {report.data.train.used:,} examples

| validation loss, on {losses.examples:,} held-out examples | nats a target token |
|---|--:|
| this model | {losses.merged:.4f} |
| its adapter beside the base in 16 bits | {losses.unmerged:.4f} |
| its adapter beside the base in 4 bits, as it was judged | {losses.reported:.4f} |
| the base before training | {losses.base:.4f} |
"""
