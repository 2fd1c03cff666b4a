"""What attacks on a swarm's pay earn: by hivetrain's rule, and by three earlier ones.

    python benchmarks/attacks.py [--rounds N] [--tempo N] [--chains N]

A real small model learns from the embedded corpus in one process; its params follow the gradients of the honest miners.
Attackers hand in real records at every round, and the package's own draws, audits and scores judge them. The draws are
repeated with the block hashes of many simulated chains, so that the table shows expected pay and not one run's luck.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from attacks_detection import LEAVES, audits_agree, detection  # noqa: E402
from attacks_miners import Miner  # noqa: E402
from attacks_simulation import OURS, Attack, Findings, Simulation, attacks  # noqa: E402
from attacks_strategies import honest  # noqa: E402
from attacks_swarm import Economy  # noqa: E402
from swarm_programs import table  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--tempo", type=int, default=20, help="rounds between two settings of weights")
    parser.add_argument("--chains", type=int, default=50, help="simulated chains, each with draws of its own")
    parser.add_argument("--trials", type=int, default=2000, help="of the detection statistics")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    economy = Economy(rounds=args.rounds, tempo_rounds=args.tempo)
    chosen = attacks(economy)
    tempos = [rounds for rounds in (4, 6, 12, 20, 30) if rounds <= args.rounds]
    findings = Simulation(economy, chosen, args.chains).run(tempos)
    print(pay_table(chosen, findings), end="\n\n")
    print(tempo_table(chosen, findings), end="\n\n")
    print(detection_table(economy, args.trials), end="\n\n")
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    excess = [
        attack.name for attack in chosen if attack.proven and findings.relative_pay[attack.name][OURS] > attack.bound
    ]
    for name in excess:
        print(f"earns more than it may: {name}", file=sys.stderr)
    return 1 if excess else 0


def pay_table(chosen: Sequence[Attack], findings: Findings) -> str:
    """Pay of each attack by each rule, and what our rule saw."""
    rules = list(next(iter(findings.relative_pay.values())))
    rows = []
    for attack in chosen:
        paid, flagged = findings.relative_pay[attack.name], findings.flagged[attack.name]
        seen = sorted(findings.verdicts[attack.name].items(), key=lambda item: -item[1])
        total = sum(findings.verdicts[attack.name].values())
        rows.append(
            [
                attack.name + ("" if attack.proven else " (not proven)"),
                *(_figure(paid[rule]) for rule in rules),
                ", ".join(f"{verdict} {count / total:.0%}" for verdict, count in seen),
                "-" if flagged is None else f"{flagged:.0%}",
            ]
        )
    economy, honest_seen = findings.economy, findings.honest_verdicts
    seen = ", ".join(f"{verdict} {count:,}" for verdict, count in sorted(honest_seen.items()))
    note = (
        f"{economy.rounds} rounds in tempos of {economy.tempo_rounds}, p = {economy.rules.probability:g}, "
        f"m = {economy.rules.leaves}; {economy.honest} honest miners with {economy.microbatches} microbatches of "
        f"{economy.batch_size} blocks a round beside each attack. Honest contributions over all chains: {seen}. "
        f"{findings.audits:,} different audits. Held-out loss {findings.losses[0]:.2f} to {findings.losses[1]:.2f}."
    )
    header = ["attack", *rules, "verdicts of hivetrain", "rounds flagged"]
    return f"{table(header, rows)}\n\n{note}"


def tempo_table(chosen: Sequence[Attack], findings: Findings) -> str:
    """How pay by our rule depends on the length of the tempo."""
    tempos = sorted(findings.by_tempo)
    shown = [attack for attack in chosen if attack.proven and max(findings.by_tempo[t][attack.name] for t in tempos)]
    rows = [[attack.name, *(_figure(findings.by_tempo[tempo][attack.name]) for tempo in tempos)] for attack in shown]
    return table(["attack", *(f"tempo of {tempo} rounds" for tempo in tempos)], rows)


def detection_table(economy: Economy, trials: int) -> str:
    """Measured detection beside the formula."""
    found = detection(economy.rules, trials, Miner("detection", 0, honest).address)
    rows = [
        [f"{each.faked:g}", str(each.rounds), f"{each.measured:.1%}", f"{each.formula:.1%}",
         f"{100 * (each.measured - each.formula):+.1f}"]
        for each in found
    ]  # fmt: skip
    right, audits = audits_agree(economy, [f"sample {number}" for number in range(20)])
    note = (
        f"{trials:,} trials of the real draw among {LEAVES} leaves; a fake leaf counts as caught when it is drawn. Of "
        f"{audits} real audits of such contributions, {right} failed exactly if a drawn leaf was fake."
    )
    return f"{table(['faked', 'rounds', 'caught, measured', 'formula', 'points'], rows)}\n\n{note}"


def _figure(relative: float) -> str:
    if relative == float("inf"):
        return "all"
    return f"{relative:.3f}" if relative < 0.1 else f"{relative:.2f}"


if __name__ == "__main__":
    sys.exit(main())
