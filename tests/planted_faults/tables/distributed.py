"""Faults of heads sharded over ranks: (name, file, old text, new text, tests of which one must fail)."""

from __future__ import annotations

SHARDED, TAIL = "prefkern/ops/sharded.py", "prefkern/ops/tail.py"
HEADS = "tests/distributed/test_sharded_heads.py"
AT_HEAD = "tests/integrations/test_head_distributed.py"

MUTANTS = [
    (
        "dh_of_each_rank_alone",
        SHARDED,
        "        return all_reduce(x, shard.group)\n",
        "        return x\n",
        HEADS,
    ),
    (
        "dh_of_other_ranks_tokens",
        SHARDED,
        "reduce_scatter(x, shard.group)[: counts[shard.rank]]",
        "x[shard.rank][: counts[shard.rank]]",
        HEADS,
    ),
    (
        "target_counted_by_every_rank",
        SHARDED,
        "torch.where(live, call.targets - shard.start, IGNORED)",
        "torch.where(live, (call.targets - shard.start) % max(call.V, 1), IGNORED)",
        HEADS,
    ),
    (
        "second_sums_of_each_rank_alone",
        SHARDED,
        "second = all_reduce(part, _group(whole))",
        "second = part",
        HEADS,
    ),
    (
        "top_counted_from_the_local_row",
        SHARDED,
        "starts = torch.tensor(shard.starts, device=every.device)",
        "starts = torch.zeros(shard.world, device=every.device)",
        HEADS,
    ),
    (
        "short_top_set_padded_with_zeros",
        SHARDED,
        "room = top.new_full((2, k, call.M), -torch.inf)",
        "room = top.new_zeros((2, k, call.M))",
        HEADS,
    ),
    (
        "last_shard_of_a_distributed_tensor_too_long",
        "prefkern/shard.py",
        "rows = -(-total // world)",
        "rows = total // world",
        HEADS,
    ),
    (
        "whole_reference_cut_as_if_shards_were_even",
        SHARDED,
        "mine = slice(plan.start, plan.start + rows)",
        "mine = slice(plan.rank * rows, plan.rank * rows + rows)",
        HEADS,
    ),
    (
        "padded_tokens_stay",
        SHARDED,
        "torch.cat([part[:n] for part, n in zip(every, counts, strict=True)])",
        "every.flatten(0, 1)[: sum(counts)]",
        HEADS,
    ),
    (
        "gradient_of_a_shard_summed_over_data_parallel_ranks",
        SHARDED,
        "made[name] = grad / shard.world",
        "made[name] = grad",
        HEADS,
    ),
    (
        "a_frozen_shard_keeps_its_own_normaliser",
        SHARDED,
        "frozen.normalise(local.own, factors, folded.sums, merged.sums)",
        "frozen.normalise(local.own, factors, folded.sums, folded.sums)",
        HEADS,
    ),
    (
        "tail_decided_per_rank",
        TAIL,
        "chunks, firsts, mine = _of_all_ranks(chunks, shard)",
        "firsts = _firsts(own.V, shard.start)",
        HEADS,
    ),
    (
        "a_whole_policy_trains_beside_a_sharded_reference",
        SHARDED,
        "if heads[0].shard is None and heads[0].requires_grad and torch.is_grad_enabled():",
        "if False:",
        HEADS,
    ),
    (
        "parallel_reference_gathered",
        "prefkern/integrations/reference.py",
        "            if self.parallel:\n",
        "            if False:\n",
        AT_HEAD,
    ),
    (
        "logits_of_the_own_tokens_kept_alone",
        "prefkern/ops/linear_stats.py",
        "scored = budget.count_of_all(record.targets, record.shard.world)",
        "scored = record.N",
        HEADS,
    ),
]
