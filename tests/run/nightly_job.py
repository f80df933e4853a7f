"""A job on a channel: held-out examples enough to judge by, and what its channel holds."""

import json
import math

from job_process import Job, records, write_lines

CHANNEL = "notes"
OF_CHANNELS = ("fresh_records.", "verdict.", "promoted.", "channel_adapter.", "channel_state.")
"""How the crash points begin that only a run on a channel passes."""


class NightlyJob(Job):
    """A job whose runs compete for a channel."""

    def __init__(self, folder, base, image=None):
        super().__init__(folder, base, image)
        write_lines(self.data / "validation.jsonl", with_customers(records(60, seed=1)))
        self.recipe["evaluate"] = {"every_steps": 3, "max_new_tokens": 4}
        self.recipe["train"]["learning_rate"] = 2e-2
        self.recipe["lora"]["dropout"] = 0.0
        self.recipe["promote"] = {"channel": CHANNEL}

    @property
    def channel(self):
        return self.store / "channels" / CHANNEL

    def promoted(self):
        path = self.channel / "promoted.json"
        return json.loads(path.read_text()) if path.exists() else None

    def state(self):
        return json.loads((self.channel / "state.json").read_text())

    def history(self):
        return [json.loads(path.read_text()) for path in sorted((self.channel / "history").iterdir())]

    def reports(self):
        return {run.name: json.loads((run / "report.json").read_text()) for run in self.runs()}

    def night(self, *options, code=0, **environment):
        """One night; its process, and the report of the run that it was about."""
        before = {run.name for run in self.runs() if (run / "report.json").exists()}
        ended = self.start("run", *options, **environment)
        assert ended.code == code, ended.stdout + ended.stderr
        new = [run for run in self.runs() if run.name not in before and (run / "report.json").exists()]
        return ended, json.loads((new[0] / "report.json").read_text()) if new else None

    def more(self, name, count, *, seed):
        """One file more to train on."""
        return write_lines(self.data / f"train-{name}.jsonl", records(count, seed=seed))

    def all_but_enough(self):
        """As if nine nights' new records had spoken for the one run that waits, so that those of a tenth are enough."""
        state = self.state()
        (waits,) = state["waiting"]
        logs = [math.log(0.8 / waits["level"])] * len(waits["better"])
        waits |= {"nights": [f"night-{number}" for number in range(9)], "records": 1800, "better": logs}
        (self.channel / "state.json").write_text(json.dumps(state))

    def in_order(self):
        """What holds on a channel at any time between two nights."""
        now = self.promoted()
        if now is None:
            return
        assert self.history()[-1] == now
        assert [each["sequence"] for each in self.history()] == list(range(1, now["sequence"] + 1))
        folder = self.channel / "adapter"
        if now["run_id"] is None:
            assert not folder.exists()
            return
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        assert (manifest["run_id"], manifest["sequence"]) == (now["run_id"], now["sequence"])
        for name in now["adapter"]["files"]:
            own = self.store / "runs" / now["run_id"] / "adapter" / name
            assert (folder / name).read_bytes() == own.read_bytes()


def with_customers(rows, each=2):
    """Records of customers who have a few each, in two languages."""
    return [
        row | {"customer": f"c{number // each}", "lang": "en" if number % 2 else "de"}
        for number, row in enumerate(rows)
    ]
