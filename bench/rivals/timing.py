"""Times whole steps of a Hugging Face Trainer and prints them as one JSON line, which `bench.compare` reads."""

import json
import time
from importlib.metadata import version

import torch
from transformers import TrainerCallback


class StepTimer(TrainerCallback):
    """From the end of a step to the end of the next: data loading and optimizer included, the device waited for."""

    def __init__(self, *, warm_up, together=1):
        """`warm_up` steps do not count; `together` steps are timed as one, where waiting for each would slow them."""
        self._warm_up, self._together = warm_up, together
        self._ends, self._losses = [], []
        self._batches = [[]]
        """For each time, real tokens (on the device: looking at them would make it wait) and all tokens."""

    def attach(self, trainer):
        """Count what goes into the trainer's steps."""
        trainer.add_callback(self)
        step = trainer.training_step

        def counted(model, inputs, *others, **more):
            mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
            real = mask.sum() if mask is not None and mask.dim() == 2 else ids.numel()
            self._batches[-1].append((real, ids.numel()))
            loss = step(model, inputs, *others, **more)
            self._losses.append(loss.detach())
            return loss

        trainer.training_step = counted

    def on_train_begin(self, *_unused, **_more):
        """The peak is that of training, not of loading."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, _arguments, state, *_unused, **_more):
        """Look at the clock when the device is done."""
        if state.global_step % self._together == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._ends.append(time.perf_counter())
            self._batches.append([])

    def report(self, model, packages):
        """Print the line: times and tokens after the warm-up, loss of the first and the last step, peak, versions."""
        first = max(1, self._warm_up // self._together)
        counts = [[sum(int(batch[kind]) for batch in group) for group in self._batches] for kind in (0, 1)]
        found = {
            "seconds": [end - before for before, end in zip(self._ends, self._ends[1:], strict=False)][first - 1 :],
            "tokens": counts[0][first : len(self._ends)],
            "padded_tokens": counts[1][first : len(self._ends)],
            "steps_together": self._together,
            "losses": [float(self._losses[0]), float(self._losses[-1])],
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "adapter_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "versions": {name: version(name) for name in packages},
        }
        print("\n" + json.dumps(found), flush=True)
