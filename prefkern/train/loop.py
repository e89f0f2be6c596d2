"""The reference trainer: load, deal out, forward to the loss, step, log, save. Read top to bottom.

A step takes `gradient_accumulation_steps` micro-batches from each of W processes. Denominators
(pairs, tokens, groups) count the whole step, so accumulation and processes change no gradient but
by rounding. What a step does follows from the configuration and the step number alone; with the
state a checkpoint holds, a killed run continues to the same bits.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import checkpoint as ckpt
from . import states
from .config import TrainConfig, check_same_run
from .data import collate, fingerprint, plan_batches
from .evaluate import deal, evaluate, kl_baseline
from .inputs import step_arguments
from .logs import History, Meter, performance, postfix, total_flos, trainer_state
from .loop_options import has_rounds
from .run import Run, prepare


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs a configuration to its end; returns the last row of the log and `log_history`."""
    if has_rounds(config):
        from .rounds import train_rounds  # which runs this loop once per round

        return train_rounds(config)
    return train_run(prepare(config))


def train_run(run: Run, *, final_run: bool = True) -> dict[str, Any]:
    """The loop itself, over a prepared run; `final_run`: no other follows in this process."""
    config, device, main = run.config, run.device, run.accelerator.is_main_process
    output_dir = Path(config.output_dir)
    run.say(f"data: {run.report}")
    modules = run.step.trained()
    total_steps = count_steps(run)
    optimizer, scheduler = make_optimizer(run.step, config, total_steps)
    state: dict[str, Any] = {
        "step": 0, "epoch": 0, "step_in_epoch": 0, "passes": 0.0,  # passes: epochs done, for logs
        "tokens": 0, "groups": 0, "loss_sum": 0.0, "window": {},
        "config": config.as_dict(), "packed": run.packed,
        "data": fingerprint(run.examples, values=True),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    torch.manual_seed(config.seed + run.rank)  # ranks start equal but differ in their dropout
    if run.resume is not None:
        state, rows = restore(run, run.resume, state, modules, optimizer, scheduler)
        run.say(f"resuming from {run.resume} at step {state['step']} of {total_steps}")
    if main:
        output_dir.mkdir(parents=True, exist_ok=True)
        ckpt.clear_partial(output_dir)
        if run.resume is None and config.overwrite_output_dir:
            ckpt.remove_checkpoints(output_dir)
    if config.report_to:
        plain = {k: v if isinstance(v, int | float) else str(v) for k, v in state["config"].items()}
        run.accelerator.init_trackers(config.run_name, config=plain)
    history = History(output_dir / "log_history.jsonl" if main else None, rows, run.accelerator)
    meter = Meter(state["window"] if main else None)

    wrapped: Any = run.step
    if run.world > 1:
        devices = [device.index] if device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(run.step, device_ids=devices)

    def log_evaluation() -> None:
        if run.eval_examples:
            found = evaluate(run, run.eval_examples, run.eval_reference)
            history.add({**found, "epoch": state["passes"], "step": state["step"]})

    def hf_state() -> dict[str, Any]:
        flos = total_flos(run.step.policy, state["tokens"])
        return trainer_state(config, state, total_steps, history.rows, flos)

    def save() -> None:
        meter.consolidate(main)
        memory = {"window": meter.state(), "losses": run.step.states.as_dict()}
        rng = gather_objects(run, ckpt.rng_state(device))
        if main:
            ckpt.save_checkpoint(
                output_dir, modules=modules, tokenizer=run.tokenizer, optimizer=optimizer,
                scheduler=scheduler, rng=rng, state=state | memory,
                trainer_state=hf_state(), keep=config.save_total_limit, parts=run.parts,
            )  # fmt: skip
        run.accelerator.wait_for_everyone()

    if state["step"] == 0:
        log_evaluation()
    started = clock = time.perf_counter()
    before = dict(state)  # counts when this process started
    tokens_at_clock = state["tokens"]
    bar = tqdm(total=total_steps, initial=state["step"], disable=config.disable_tqdm or not main)
    while state["step"] < total_steps:
        chunks = epoch_chunks(run, state["epoch"])
        while state["step_in_epoch"] < len(chunks) and state["step"] < total_steps:
            chunk = chunks[state["step_in_epoch"]]
            groups = [run.examples[i] for indices in chunk for i in indices]
            num_items = run.count_items(groups)
            shares = step_arguments(run.records, config.loss_args, groups)
            run.step.states.progress = state["step"] / total_steps
            mine = list(deal(chunk, run.rank, run.world))
            step_loss = torch.zeros((), dtype=torch.float64, device=device)
            for number, (indices, real) in enumerate(mine):
                examples = [run.examples[i] for i in indices]
                batch = collate(examples, **run.collate_options).to(device)
                reference = run.reference.rows(batch, indices)
                reference.loss_args |= shares
                if run.needs.kl_baseline:
                    baseline = kl_baseline(run, run.reference, examples, real)
                    reference.loss_args["kl_baseline"] = baseline
                last = number == len(mine) - 1
                with nullcontext() if run.world == 1 or last else wrapped.no_sync():
                    loss, metrics = wrapped(batch, reference, num_items, real=real)
                    # DDP averages over ranks. A filler batch keeps a rank in step and counts 0.
                    (loss * (run.world if real else 0.0)).backward()
                if real:
                    step_loss += loss.detach()
                    meter.add_all(metrics, examples)
            grad_norm = clip(run.step, config.max_grad_norm)
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)

            meter.add("loss", step_loss * run.world)
            state["step"] += 1
            for part in run.parts:
                part.after_step(state["step"], optimizer)
            state["step_in_epoch"] += 1
            state["groups"] += len(groups)
            state["tokens"] += sum(example.num_tokens for example in groups)
            state["passes"] = state["epoch"] + state["step_in_epoch"] / len(chunks)
            last_step = state["step"] == total_steps
            bar.update()
            if last_step or state["step"] % config.logging_steps == 0:
                means = meter.pop()
                if not math.isfinite(means["loss"]):
                    raise ValueError(
                        f"the loss became {means['loss']} by step {state['step']}: lower the "
                        "learning rate, or check the rows of the last steps."
                    )
                state["loss_sum"] += means["loss"] * window(state["step"], config.logging_steps)
                seconds = time.perf_counter() - clock
                row = {
                    **means,
                    "grad_norm": float(grad_norm),
                    "learning_rate": learning_rate,
                    "num_tokens": state["tokens"],
                    **performance(device, state["tokens"] - tokens_at_clock, seconds),
                    "epoch": state["passes"],
                    "step": state["step"],
                }
                history.add(row)
                bar.set_postfix(postfix(row))
                clock, tokens_at_clock = time.perf_counter(), state["tokens"]
            due = config.eval_steps and state["step"] % config.eval_steps == 0
            if due or last_step:
                log_evaluation()
                clock, tokens_at_clock = time.perf_counter(), state["tokens"]
            if config.save_steps and state["step"] % config.save_steps == 0:
                save()
        if state["step"] < total_steps:
            state["epoch"], state["step_in_epoch"] = state["epoch"] + 1, 0
    bar.close()

    seconds = time.perf_counter() - started
    final = {
        "train_loss": state["loss_sum"] / max(state["step"], 1),
        "train_runtime": seconds,
        "train_samples_per_second": (state["groups"] - before["groups"]) / seconds,
        "train_steps_per_second": (state["step"] - before["step"]) / seconds,
        "total_flos": total_flos(run.step.policy, state["tokens"]),
        "epoch": state["passes"],
        "step": state["step"],
    }
    history.add(final)
    if main:
        ckpt.save_final(output_dir, modules, run.tokenizer)
        if run.step.states.rules:
            ckpt.write_json(output_dir / states.FILE, run.step.states.as_dict())
        ckpt.write_json(output_dir / "trainer_state.json", hf_state())
        if config.plots:
            from .plots import plot_history

            plot_history(history.rows, output_dir)
    run.accelerator.wait_for_everyone()
    if final_run:
        run.accelerator.end_training()  # which also ends the process group
    else:
        for tracker in run.accelerator.trackers:
            tracker.finish()
    return {**final, "log_history": history.rows}


def restore(
    run: Run,
    checkpoint: Path,
    state: dict[str, Any],
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Loads a checkpoint of this very run; returns the loop's state and the rows logged so far."""
    saved = ckpt.read_json(checkpoint / ckpt.STATE_FILE)
    check_same_run(saved["config"], run.config)
    if saved["data"] != state["data"]:
        raise ValueError(f"{checkpoint} was written by a run on other data; restore the data set.")
    if saved["packed"] != run.packed:
        raise ValueError(
            f"{checkpoint} was trained on {'packed' if saved['packed'] else 'padded'} batches, "
            f"which is not the choice here; set packing={'on' if saved['packed'] else 'off'}."
        )
    ckpt.load_training_state(
        checkpoint,
        modules=modules,
        optimizer=optimizer,
        scheduler=scheduler,
        rank=run.rank,
        world=run.world,
        device=run.device,
    )
    for part in run.parts:
        part.load(checkpoint)
    run.step.states.load(saved["losses"])
    rows = ckpt.read_json(checkpoint / "trainer_state.json")["log_history"]
    return saved | {"config": state["config"]}, rows


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


def make_optimizer(
    step: nn.Module, config: TrainConfig, total_steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with decay on matrices only, masks in a group of their own, and the schedule."""
    from transformers import get_scheduler
    from transformers.trainer_pt_utils import get_parameter_names

    no_decay = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(step, [nn.LayerNorm], no_decay))
    mask_rate = config.mask_learning_rate
    groups: dict[str, dict[str, Any]] = {
        "decay": {"params": [], "weight_decay": config.weight_decay},
        "no_decay": {"params": [], "weight_decay": 0.0},
        "masks": {
            "params": [],
            "weight_decay": config.mask_weight_decay,
            "lr": config.learning_rate if mask_rate is None else mask_rate,
        },
        "slow": {
            "params": [],
            "weight_decay": config.weight_decay,
            "lr": config.slow_learning_rate,
        },
    }
    for name, parameter in step.named_parameters():
        if parameter.requires_grad:
            kind = "decay" if name in decayed else "no_decay"
            if config.slow_learning_rate is not None and ".slow." in name:
                kind = "slow"
            groups["masks" if name.startswith("masks.") else kind]["params"].append(parameter)
    optimizer = torch.optim.AdamW(
        [group for group in groups.values() if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    scheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total_steps,
    )
    return optimizer, scheduler


def clip(step: nn.Module, limit: float) -> Tensor:  # []
    """Gradient norm before clipping; with limit 0 nothing is clipped."""
    parameters = [p for p in step.parameters() if p.grad is not None]
    return nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf)


def gather_objects(run: Run, value: Any) -> list[Any]:
    """One entry per process."""
    if run.world == 1:
        return [value]
    everyone: list[Any] = [None] * run.world
    torch.distributed.all_gather_object(everyone, value)
    return everyone
