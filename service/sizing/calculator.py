"""From costs and a traffic to replicas, memory and money, and the same for text mode. Closed form, no simulation.

At saturation a replica's worker does one thing after the other, so an answer costs the sum of its stages, its decode
steps shared by all answers that run together.
"""

import math
from dataclasses import dataclass

from core.config import Mode
from service.sizing.costs import Costs
from service.sizing.simulation import Limits, Traffic

HOURS_PER_S = 1 / 3600


@dataclass(frozen=True, slots=True)
class Price:
    """What one replica's machine costs, in US dollars an hour, and who says so.

    device  what its costs must have been measured on, as the benchmark's JSON names it
    """

    name: str
    per_hour: float
    source: str
    device: str


AWS = "AWS price list of 2026-09-24, on-demand, Linux, us-east-1, as copied in github.com/getnable/finopsmcp"
# Those of CPUs are not of the machine of the built-in costs, which has no public price: they have as many cores, and
# give an order of magnitude.
PRICES = {
    "c7i.large": Price("c7i.large (2 vCPU, x86, 4 GiB)", 0.08925, AWS, "cpu"),
    "m7i.large": Price("m7i.large (2 vCPU, x86, 8 GiB)", 0.1008, AWS, "cpu"),
    "g5.xlarge": Price("g5.xlarge (4 vCPU, A10G)", 1.006, AWS, "NVIDIA A10G"),
    "g6.xlarge": Price("g6.xlarge (4 vCPU, L4)", 0.8048, AWS, "NVIDIA L4"),
    "inf2.xlarge": Price("inf2.xlarge (4 vCPU, 2 NeuronCores-v2)", 0.7582, AWS, "neuron"),
    "trn1.2xlarge": Price("trn1.2xlarge (8 vCPU, 2 NeuronCores-v2)", 1.34375, AWS, "neuron"),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What one way to answer needs for a rate of requests.

    sequences       answers that a replica writes at a time, when it is saturated
    stages_s        of one answer, by stage: a replica's time
    capacity        answers a second of one replica, saturated
    replicas        so that each is busy for `utilisation` of its time
    alone_s         latency of a request that meets nobody
    memory_bytes    of one replica
    cost_per_million   US dollars for a million answers at this rate
    """

    mode: Mode
    prompt_tokens: int
    sequences: int
    stages_s: dict[str, float]
    capacity: float
    replicas: int
    utilisation: float
    alone_s: float
    memory_bytes: int
    cost_per_million: float


def plan(costs: Costs, traffic: Traffic, limits: Limits, rate: float, busy: float, price: Price) -> Plan:
    """Replicas for `rate` requests a second, none busier than `busy` (0..1) on average."""
    sizes, mode = traffic.sizes, traffic.mode
    prompt = costs.prompt_tokens(sizes, mode)
    room = prompt + sizes.new_tokens
    sequences = max(1, min(limits.max_sequences, limits.kv_tokens // room))
    stages = _stages(costs, traffic, prompt, sequences)
    alone = sum(_stages(costs, traffic, prompt, 1).values())
    capacity = 1 / sum(stages.values())
    replicas = max(1, math.ceil(rate / (capacity * busy)))
    return Plan(
        mode=mode,
        prompt_tokens=prompt,
        sequences=sequences,
        stages_s=stages,
        capacity=capacity,
        replicas=replicas,
        utilisation=rate / (replicas * capacity),
        alone_s=alone,
        memory_bytes=costs.memory_bytes(sequences, room),
        cost_per_million=replicas * price.per_hour * HOURS_PER_S / rate * 1e6,
    )


def _stages(costs: Costs, traffic: Traffic, prompt: int, sequences: int) -> dict[str, float]:
    """Of one answer among so many; a compression batch is shared by as many requests."""
    sizes = traffic.sizes
    positions = sizes.passages * costs.chunks(sizes) * costs.row_tokens(sizes)
    steps = sizes.new_tokens - 1  # the first token comes with the prefill
    context = prompt + sizes.new_tokens / 2
    return {
        "prepare": costs.prepare_s(sizes),
        "compress": costs.compress_s(positions * sequences) / sequences if traffic.ranked else 0.0,
        "prefill": costs.prefill_s([prompt]),
        "decode": steps * costs.step_s(sequences, sequences * context) / sequences,
    }
