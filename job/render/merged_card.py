"""A merged model's README: what it was made of, how good it is, under which licence; with front matter for hubs."""

import json

from job.core.export import Export
from job.core.recipe import is_hub_id
from job.core.report import Report
from job.core.visible import code_span


def merged_card(export: Export, report: Report) -> str:
    """README.md, in Markdown."""
    losses, licence = export.losses, report.model.licence
    named = f"license: {json.dumps(licence)}\n" if licence and is_hub_id(export.base) else ""
    onto = "its own weights" if export.onto == "weights" else "its weights as they are in 4 bits"
    said = code_span(licence) if licence else "not known; look at the base model"
    return f"""---
base_model: {json.dumps(export.base)}
base_model_relation: finetune
library_name: transformers
{named}tags: [qlora, merged]
---
# {code_span(export.base)}, fine-tuned

The adapter of run `{report.run_id}`, step {export.step}, merged into {onto}.

- Base: {code_span(export.base)}, revision {code_span(export.revision)}
- Licence of the base: {said}. It holds for what is made from the base too.
- Trained on {report.data.train.used} examples

| validation loss, on {losses.examples} held-out examples | nats a target token |
|---|--:|
| this model | {losses.merged:.4f} |
| its adapter beside the base in 16 bits | {losses.unmerged:.4f} |
| its adapter beside the base in 4 bits, as it was judged | {losses.reported:.4f} |
| the base before training | {losses.base:.4f} |
"""
