"""The training loop: deal out, forward to the loss, step, log, save.

A step takes `gradient_accumulation_steps` micro-batches from each of W processes. Denominators
(pairs, tokens, groups) count the whole step, so accumulation and processes change no gradient but
by rounding. What a step does follows from the configuration and the step number alone; with the
state a checkpoint holds, a killed run continues to the same bits.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from . import checkpoint as ckpt
from . import finite, resumed, sources, zero
from .data import Example, plan_batches
from .deal import deal
from .evaluate import evaluate
from .logs import History, Meter, Shares, performance, postfix, total_flos, trainer_state
from .optimizer import clip, make_scheduler, rounded_away, take_step
from .output import LOG, TRAINER_STATE, Output, run_of, writing
from .run import Run


def train_run(run: Run, *, final_run: bool = True) -> dict[str, Any]:
    """Runs a prepared run to its end; `final_run`: no other follows in this process.

    Returns:
        The last row of the log, and `log_history`.
    """
    loop = Loop(run)
    with loop.opened_output():
        if loop.counts.step == 0:
            loop.evaluate()
        loop.run_steps()
        final = loop.finish()
    if final_run:
        run.accelerator.end_training()  # which also ends the process group
    else:
        for tracker in run.accelerator.trackers:
            tracker.finish()
    return final


@dataclass
class Counts:
    """How far a run is."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    passes: float = 0.0  # epochs done, for logs
    tokens: int = 0
    groups: int = 0
    loss_sum: float = 0.0  # over all steps logged so far
    largest_norm: float = 0.0  # of the gradients so far


class Loop:
    """One prepared run in this process."""

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.step = run, run.config, run.step
        self.output_dir = Path(run.config.output_dir)
        self.total_steps = count_steps(run)
        # accelerate's wrapper steps; what it wraps is what schedules and checkpoints know
        self.optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
        self.scheduler = make_scheduler(zero.inner(self.optimizer), run.config, self.total_steps)
        self.counts = Counts()
        run.say(f"data: {run.report}")
        if run.eval_data is not None:
            run.say(f"eval data: {run.eval_data.report}")
        if (share := rounded_away(run.step, run.config.learning_rate)) > 0.5:
            run.say(
                f"{share:.0%} of the bfloat16 weights cannot move at learning_rate "
                f"{run.config.learning_rate:g}: updates of that size are lost in rounding. "
                "--dtype float32 --bf16 keeps fp32 weights and computes in bfloat16."
            )
        torch.manual_seed(run.config.seed + run.rank)  # ranks start equal, their dropout differs
        rows, window = self._restored() if run.resume is not None else ([], {})
        path = self.output_dir / LOG if run.is_main else None
        # of the models as they were loaded, where a checkpoint is going to need it
        saves = run.is_main and 0 < self.config.save_steps <= self.total_steps
        self.contents = sources.contents(self.config) if saves else {}
        self._rows, self._path = rows, path
        self.meter = Meter(window if run.is_main else None)

    def _restored(self) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
        """Loads the checkpoint that the run continues from: the rows logged so far, and the sums of
        the row that was not logged yet."""
        run, checkpoint = self.run, self.run.resume
        assert checkpoint is not None
        saved = ckpt.read_json(checkpoint / ckpt.STATE_FILE)
        resumed.check_continued(run, checkpoint, saved)
        if run.is_main:
            sources.check_same(saved["contents"], run.config)
        same = ckpt.load_training_state(
            checkpoint, run.processes, modules=run.step.trained(), optimizer=self.optimizer,
            scheduler=self.scheduler, parts=run.providers,
        )  # fmt: skip
        if not same or saved["world"] != run.world:
            resumed.other_world(run, saved)
        for provider in run.providers:
            provider.restore(saved)
            provider.load(checkpoint)
        names = [option.name for option in dataclasses.fields(Counts)]
        self.counts = Counts(**{name: saved[name] for name in names})
        run.say(f"resuming from {checkpoint} at step {self.counts.step} of {self.total_steps}")
        rows = ckpt.read_json(checkpoint / TRAINER_STATE)["log_history"]
        return rows, saved["window"]

    @contextmanager
    def opened_output(self) -> Iterator[None]:
        """The output folder, held against other runs, the log and the trackers."""
        run, config = self.run, self.config
        self.output: Output | None = None  # of the main process
        if run.is_main:
            self.output = Output(
                self.output_dir,
                run_of(run.resume),
                overwrite=run.resume is None and config.overwrite_output_dir,
                continues=config.resume_from_checkpoint is not None,
            )
            if self.output.note:
                run.say(self.output.note)
        try:
            self._open_logs()
            yield
        finally:
            if self.output is not None:
                self.output.close()

    def _open_logs(self) -> None:
        run, config = self.run, self.config
        if self.output is not None:
            self.output.will_make([LOG])
        if config.report_to:
            plain = {
                k: v if isinstance(v, int | float) else str(v) for k, v in config.as_dict().items()
            }
            run.accelerator.init_trackers(config.run_name, config=plain)
        self.history = History(self._path, self._rows, run.accelerator)

    # Steps.

    def run_steps(self) -> None:
        """Every step that is left, with the log, evaluations and checkpoints that fall due."""
        counts, config = self.counts, self.config
        self.before, self.started = dataclasses.replace(counts), time.perf_counter()
        self.start = finite.sampled(self.run.step)
        self._start_window()
        silent = config.disable_tqdm or not self.run.is_main
        with tqdm(total=self.total_steps, initial=counts.step, disable=silent) as bar:
            while counts.step < self.total_steps:
                chunks = epoch_chunks(self.run, counts.epoch)
                while counts.step_in_epoch < len(chunks) and counts.step < self.total_steps:
                    if any([provider.renew(counts.step) for provider in self.run.providers]):
                        break
                    self._one_step(chunks[counts.step_in_epoch], len(chunks))
                    bar.update()
                    self._after_step(bar)
                if counts.step < self.total_steps:
                    counts.epoch, counts.step_in_epoch = counts.epoch + 1, 0

    def _one_step(self, chunk: list[list[int]], steps_in_epoch: int) -> None:
        """One optimizer step over the micro-batches `chunk` of all processes."""
        run, counts = self.run, self.counts
        groups = [run.examples[i] for indices in chunk for i in indices]
        num_items = run.count_items(groups)
        for provider in run.providers:
            provider.begin_step(groups, counts.step / self.total_steps)
        mine = list(deal(chunk, run.rank, run.world))
        shares = Shares()
        for number, (indices, real) in enumerate(mine):
            examples = [run.examples[i] for i in indices]
            self._backward(examples, num_items, real, shares, last=number == len(mine) - 1)
        self.grad_norm = clip(run.accelerator, run.root, self.config.max_grad_norm)
        self._check_finite(shares, groups)
        self.learning_rate = self.scheduler.get_last_lr()[0]
        take_step(run.optimizer, float(self.learning_rate), counts.step + 1)
        self.scheduler.step()
        run.optimizer.zero_grad(set_to_none=True)

        shares.log(self.meter, run.world)
        counts.step += 1
        for provider in run.providers:
            provider.after_step(counts.step, self.optimizer)
        counts.step_in_epoch += 1
        counts.groups += len(groups)
        counts.tokens += sum(example.num_tokens for example in groups)
        counts.passes = counts.epoch + counts.step_in_epoch / steps_in_epoch

    def _backward(
        self,
        examples: list[Example],
        num_items: dict[str, int],
        real: bool,
        shares: Shares,
        *,
        last: bool,
    ) -> None:
        """Gradients of one micro-batch, and what it adds to the log; `real` as in `deal`."""
        run = self.run
        micro = run.micro_batch(examples, real=real)
        reference, given = run.constants(micro)
        # Sharded gradients are reduced after every micro-batch: a process that waited for the last
        # would hold all of them until then.
        waits = not last and not run.accelerator.is_fsdp2
        run.accelerator.sync_gradients = last  # DeepSpeed clips and steps within the backward then
        with run.accelerator.no_sync(run.wrapped) if waits else nullcontext():
            loss, metrics = run.wrapped(run.step, micro, reference, given, num_items)
            # Gradients are means over ranks. A filler batch keeps a rank in step and counts 0.
            run.accelerator.backward(loss * (run.world if real else 0.0))
        shares.add(loss, metrics, real)
        if real:
            self.meter.add_means(metrics, examples)

    def _check_finite(self, shares: Shares, groups: list[Example]) -> None:
        """Ends the run before a step that is no number reaches the weights or a file."""
        counts, norm = self.counts, float(self.grad_norm)
        found = {"loss": float(shares.sums["loss"]), "grad_norm": norm}
        if finite.is_finite(found):
            counts.largest_norm = max(counts.largest_norm, norm)
            return
        self.history.add({**found, "epoch": counts.passes, "step": counts.step + 1})
        lists = self.run.layout == "lists"
        raise ValueError(
            finite.message_of(
                found, counts.step + 1, groups, lists, ckpt.last_whole(self.output_dir)
            )
        )

    def _check_weights(self) -> None:
        """Refuses to write weights that are no numbers."""
        run, counts = self.run, self.counts
        finite.check_weights(run.step, counts.step, self.output_dir, run.processes)

    def _after_step(self, bar: Any) -> None:
        step, config = self.counts.step, self.config
        last = step == self.total_steps
        if last or step % config.logging_steps == 0:
            bar.set_postfix(postfix(self._log()))
            self._start_window()
        if last or (config.eval_steps and step % config.eval_steps == 0):
            self.evaluate()
            self._start_window()
        if config.save_steps and step % config.save_steps == 0:
            self._save()

    # Logs, evaluation, checkpoints.

    def _start_window(self) -> None:
        """Tokens per second count from here: no evaluation is among them."""
        self.clock, self.tokens_at_clock = time.perf_counter(), self.counts.tokens

    def _log(self) -> dict[str, Any]:
        """The row of the steps since the last one."""
        counts, means = self.counts, self.meter.pop()
        counts.loss_sum += means["loss"] * window(counts.step, self.config.logging_steps)
        seconds = time.perf_counter() - self.clock
        row = {
            **means,
            "grad_norm": float(self.grad_norm),
            "learning_rate": self.learning_rate,
            "num_tokens": counts.tokens,
            **performance(self.run.device, counts.tokens - self.tokens_at_clock, seconds),
            "epoch": counts.passes,
            "step": counts.step,
        }
        self.history.add(row)
        return row

    def evaluate(self) -> None:
        """Logs the held-out metrics, where there are held-out data."""
        if self.run.eval_examples:
            found = evaluate(self.run, self.run.eval_examples)
            self.history.add({**found, "epoch": self.counts.passes, "step": self.counts.step})

    def _trainer_state(self) -> dict[str, Any]:
        counts = self.counts
        return trainer_state(
            self.config, counts.step, self.total_steps, counts.tokens, self.history.rows,
            total_flos(self.step.policy, counts.tokens),
        )  # fmt: skip

    def _save(self) -> None:
        """A checkpoint of this step."""
        run = self.run
        self._check_weights()
        self.meter.consolidate(run.is_main)
        state = dataclasses.asdict(self.counts) | {
            "window": self.meter.state(),
            "config": self.config.as_dict(),
            "packed": run.packed,
            "world": run.world,
            "data": run.data_hash,
            "contents": self.contents,
        }
        for provider in run.providers:
            state |= provider.state()
        rng = run.processes.everyone(ckpt.rng_state(run.device))
        ckpt.save_checkpoint(
            self.output, run.processes, modules=run.step.trained(), tokenizer=run.tokenizer,
            optimizer=self.optimizer, scheduler=self.scheduler, rng=rng, state=state,
            trainer_state=self._trainer_state(), keep=self.config.save_total_limit,
            parts=run.providers,
        )  # fmt: skip

    def finish(self) -> dict[str, Any]:
        """The last row of the log, the trained model and the pictures."""
        run, counts, before = self.run, self.counts, self.before
        self._check_weights()
        if counts.largest_norm == 0.0:
            raise ValueError(
                "every gradient of the run was 0, so nothing was trained and nothing is written: "
                "look at the column weight, at the loss's arguments and at its metrics in the log."
            )
        if counts.step > before.step:
            finite.check_moved(run.step, self.start, self.config, run.processes)
        seconds = time.perf_counter() - self.started
        final = {
            "train_loss": counts.loss_sum / max(counts.step, 1),
            "train_runtime": seconds,
            "train_samples_per_second": (counts.groups - before.groups) / seconds,
            "train_steps_per_second": (counts.step - before.step) / seconds,
            "total_flos": total_flos(self.step.policy, counts.tokens),
            "epoch": counts.passes,
            "step": counts.step,
        }
        self.history.add(final)
        trained = run.step.trained()
        ckpt.save_final(self.output, run.processes, trained, run.tokenizer, run.providers)
        if self.output is not None:
            self.output.will_make([TRAINER_STATE])
            with writing(self.output_dir / TRAINER_STATE):
                ckpt.write_json(self.output_dir / TRAINER_STATE, self._trainer_state())
            if self.config.plots:
                from .plots import plot_history

                plotted = plot_history(self.history.rows, self.output_dir)
                self.output.will_make(path.name for path in plotted.files)
            self.output.finish()
        run.accelerator.wait_for_everyone()
        return {**final, "log_history": self.history.rows}


def epoch_chunks(run: Run, epoch: int) -> list[list[list[int]]]:
    """One entry per optimizer step: its micro-batches, each a list of example indices."""
    config = run.config
    batches = plan_batches(
        run.examples,
        seed=config.seed,
        epoch=epoch,
        groups_per_batch=None if config.token_budget else config.per_device_train_batch_size,
        token_budget=config.token_budget,
        packing=run.packed,
    )
    size = config.gradient_accumulation_steps * run.world
    return [batches[i : i + size] for i in range(0, len(batches), size)]


def count_steps(run: Run) -> int:
    """Optimizer steps of the whole run."""
    if run.config.max_steps > 0:
        return run.config.max_steps
    whole, part = divmod(run.config.num_train_epochs, 1.0)
    steps = sum(len(epoch_chunks(run, epoch)) for epoch in range(int(whole)))
    return steps + math.ceil(part * len(epoch_chunks(run, int(whole))) - 1e-9)


def window(step: int, logging_steps: int) -> int:
    """Steps that the row logged at `step` is a mean of."""
    return (step - 1) % logging_steps + 1
