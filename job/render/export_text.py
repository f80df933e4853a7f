"""An export for people: where it stands, and the losses that prove it."""

from job.core.reports.export import Export


def export_lines(export: Export, uri: str) -> list[str]:
    """The last lines of the command."""
    losses, limits = export.losses, export.limits
    size = sum(file.size for file in export.files.values())
    weights = sum(name.endswith(".safetensors") for name in export.files)
    files = "1 file" if weights == 1 else f"{weights} files"
    of = "" if losses.examples == losses.of_examples else f" of {losses.of_examples}"
    onto = "the base's own weights" if export.onto == "weights" else "the base's weights as they are in 4 bits"
    if export.quantised_base and export.onto == "weights":
        onto = "the base's weights, dequantised: it is published in 4 bits"
    lines = [
        f"merged model       {uri}",
        f"                   {size / 1e9:,.2f} GB, {export.dtype}, {files} of weights; onto {onto}",
        f"validation loss    on {losses.examples}{of} held-out examples, nats a token",
        f"  merged           {losses.merged:.4f}",
        f"  adapter, 16 bits {losses.unmerged:.4f}  beside the base's own weights",
        f"  adapter, 4 bits  {losses.reported:.4f}  as the report has it; the base alone {losses.base:.4f}",
    ]
    compared = "adapter, 4 bits" if export.onto == "quantised" else "adapter, 16 bits"
    lines.append(f"refused above      {limits.rounding:.4f} between merged and {compared}{_worse(limits.quantisation)}")
    if export.untied:
        lines.append(
            "head               its own weights now: they were the embeddings', and one of the two was adapted"
        )
    stops = ", ".join(map(str, export.eos_token_id)) or "nothing that was trained"
    lines.append(f"stops at           {stops} (generation_config.json)")
    return lines


def _worse(limit: float | None) -> str:
    return "" if limit is None else f"; merged worse than 4 bits by {limit:.4f}"
