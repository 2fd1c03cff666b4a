"""Runs all attacks through one trajectory of params, and judges each as if it were the only one."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import attacks_strategies as does
import torch
from attacks_earlier import earlier_rules
from attacks_miners import Miner, Strategy, Submission
from attacks_swarm import Economy, Swarm
from attacks_validator import Admitted, Validator, averages_by_tempo, pay

from hivetrain.contribution.audit import SUM_TOLERANCES, Verdict, check_sum
from hivetrain.scoring import Judged

OURS = "hivetrain"
ATTACK_SLOT = 20
BOUND = 0.05
FIRST_BLOCK = 100


@dataclass(frozen=True)
class Attack:
    """One kind of dishonest miner.

    Args:
        name: for the table.
        strategy: of each of its hotkeys.
        hotkeys: how many.
        machines: on how many machines they run; pay is per machine.
        bound: most that it may earn, in units of an honest miner's pay.
        proven: whether our rule claims to stop it.
    """

    name: str
    strategy: Strategy
    hotkeys: int = 1
    machines: int = 1
    bound: float = BOUND
    proven: bool = True


def attacks(economy: Economy) -> list[Attack]:
    """All of them."""
    majority = economy.honest + 1
    honest_share = 1 - does.HIT_ROUNDS / economy.tempo_rounds
    tempos = range(1, 1 + -(-economy.rounds // economy.tempo_rounds))
    leaver = sum(0.5**tempo / (1 - 0.5**tempo) for tempo in tempos) / len(tempos)  # pay of one honest tempo, in all
    return [
        Attack("free rider: random sketches", does.free_rider),
        Attack("lazy: one sequence claimed as all", does.lazy),
        Attack("lazy: half of each microbatch", does.lazy_sequence),
        Attack("stale params, one update old", does.stale),
        Attack("copied from an honest friend", does.copied),
        Attack("replayed: old leaves in a new record", does.replayed),
        Attack("replayed: an old record as it is", does.resent),
        Attack("replayed: the same data every round", does.same_data),
        Attack("wrong data: the easiest of others' units", does.easy_data),
        Attack("over-claim of samples, x10", does.over_claim),
        Attack("over-claim of samples, x10^9", does.billionfold_claim),
        Attack("hit and run: made up in 3 rounds a tempo", does.hit_and_run),
        Attack("hit and run: one over-claim a tempo", does.huge_hit_and_run),
        Attack("sleeper: an honest tempo, then hit and run", does.sleeper, bound=leaver),
        Attack("honest, but 3 rounds a tempo made up", does.honest_but_few, bound=honest_share),
        Attack("honest, but one over-claim a tempo", does.honest_but_once, bound=1 + BOUND),
        Attack("norm inflation x100", does.inflated),
        Attack("sign flip", does.flipped),
        Attack("no reveal", does.no_reveal),
        Attack("late commit", does.late),
        Attack("early commit, beacon awaited", does.early),
        Attack("unknown precision", does.unknown_precision),
        Attack("sybil split: one machine, 3 hotkeys", does.split, hotkeys=3, bound=1 + BOUND),
        Attack("colluding false reporters (51 %), each", does.false_reporter, hotkeys=majority, machines=majority),
        Attack("idle attendant", does.idle),
        Attack("malformed record", does.malformed),
        Attack("huge record, 1 MB", does.huge),
        Attack("honest record, sends x100", does.other_bytes_inflated, proven=False),
        Attack("honest record, sends the opposite", does.other_bytes_flipped, proven=False),
        Attack("honest leaves, total and bytes x100", does.false_total, proven=False),
    ]


@dataclass
class Findings:
    """What a simulation found.

    Attributes:
        economy: its size.
        relative_pay: pay of an attack in units of an honest miner's, by attack and rule; inf where only the attackers
            are paid.
        honest_verdicts: how often honest miners' contributions got each verdict, over all chains.
        verdicts: the same for each attack.
        flagged: share of the rounds in which the sums did not match, by attack; None where no sum could be checked.
        by_tempo: relative pay by our rule of each attack for other lengths of the tempo, in rounds.
        audits: audits made; each counts once, however many chains drew it.
        losses: held-out loss at the begin and at the end.
    """

    economy: Economy
    relative_pay: dict[str, dict[str, float]] = field(default_factory=dict)
    honest_verdicts: dict[Verdict, int] = field(default_factory=dict)
    verdicts: dict[str, dict[Verdict, int]] = field(default_factory=dict)
    flagged: dict[str, float | None] = field(default_factory=dict)
    by_tempo: dict[int, dict[str, float]] = field(default_factory=dict)
    audits: int = 0
    losses: tuple[float, float] = (0.0, 0.0)


class Simulation:
    """All attacks on one trajectory of params, each judged as if it were the only one."""

    def __init__(self, economy: Economy, chosen: Sequence[Attack], chains: int) -> None:
        self.economy, self.attacks = economy, chosen
        self._chains = [f"chain {number}" for number in range(chains)]
        self._swarm = Swarm(economy)
        self._validator = Validator(self._swarm)
        self._honest = [Miner(f"honest {number}", number, does.honest) for number in range(economy.honest)]
        self._groups = [_members(attack) for attack in chosen]
        self._judged: dict[str, list[list[Judged]]] = {}  # by hotkey, then by chain
        self._rules = earlier_rules(economy.seed)
        self._earlier = {(rule.name, attack.name): [0.0, 0.0] for rule in self._rules for attack in chosen}
        self._sums: dict[str, list[bool]] = {attack.name: [] for attack in chosen}

    def run(self, tempos: Sequence[int] = ()) -> Findings:
        """Runs all rounds; ``tempos`` are further lengths of the tempo to look at."""
        begin = self._swarm.held_out_loss()
        for _ in range(self.economy.rounds):
            self._round()
        findings = Findings(self.economy, audits=self._validator.audits, losses=(begin, self._swarm.held_out_loss()))
        findings.honest_verdicts = self._count(self._honest)
        ours = self._relative_pay(self.economy.tempo_rounds)
        for attack, group in zip(self.attacks, self._groups, strict=True):
            findings.relative_pay[attack.name] = {OURS: ours[attack.name]} | {
                rule.name: _ratio(*self._earlier[rule.name, attack.name]) for rule in self._rules
            }
            findings.verdicts[attack.name] = self._count(group)
            checked = self._sums[attack.name]
            findings.flagged[attack.name] = sum(checked) / len(checked) if checked else None
        findings.by_tempo = {tempo: self._relative_pay(tempo) for tempo in tempos}
        return findings

    def _round(self) -> None:
        swarm, block = self._swarm, FIRST_BLOCK + self._swarm.epoch * self.economy.blocks_per_round
        everybody = [*self._honest, *(miner for group in self._groups for miner in group)]
        came = {miner.address: miner.submit(swarm, block) for miner in everybody}
        self._validator.begin_round()
        admitted = {hotkey: self._validator.admit(submission) for hotkey, submission in came.items()}
        for hotkey, each in admitted.items():
            of_chain = self._judged.setdefault(hotkey, [[] for _ in self._chains])
            for judged, chain in zip(of_chain, self._chains, strict=True):
                if each is not None:
                    judged.append(self._validator.judge(each, chain))
        self._pay_as_earlier(came)
        for attack, group in zip(self.attacks, self._groups, strict=True):
            self._check_sum(attack, [admitted[miner.address] for miner in (*self._honest, *group)])
        swarm.advance(torch.stack([came[miner.address].claim.sent for miner in self._honest]).mean(0))

    def _pay_as_earlier(self, came: dict[str, Submission]) -> None:
        for rule in self._rules:
            observed = {hotkey: rule.observe(submission, self._swarm) for hotkey, submission in came.items()}
            for attack, group in zip(self.attacks, self._groups, strict=True):
                shares = rule.shares({miner.address: observed[miner.address] for miner in (*self._honest, *group)})
                earned = self._earlier[rule.name, attack.name]
                earned[0] += sum(shares[miner.address] for miner in group) / attack.machines
                earned[1] += sum(shares[miner.address] for miner in self._honest) / len(self._honest)

    def _check_sum(self, attack: Attack, round_: Sequence[Admitted | None]) -> None:
        """Compares what the all-reduce would give with what the records say; impossible if a record is missing."""
        known = [(each.submission, each.record) for each in round_ if each is not None and each.record is not None]
        if len(known) < len(round_):
            return
        weights = [float(min(submission.offered, self.economy.max_samples)) for submission, _ in known]
        sent = torch.stack([submission.claim.sent for submission, _ in known])
        average = (torch.tensor(weights) @ sent) / sum(weights)
        members = [(weight, record) for weight, (_, record) in zip(weights, known, strict=True)]
        error = check_sum(self._swarm.sketcher.sketch_flat(average), members)
        self._sums[attack.name].append(error > SUM_TOLERANCES["none"])

    def _relative_pay(self, tempo_rounds: int) -> dict[str, float]:
        """Expected pay of each attack over that of an honest miner beside it, over all chains."""
        hotkeys, rounds = list(self._judged), self.economy.rounds
        earned = {attack.name: [0.0, 0.0] for attack in self.attacks}
        for chain in range(len(self._chains)):
            judged = [each for of_chain in self._judged.values() for each in of_chain[chain]]
            averages = averages_by_tempo(judged, hotkeys, tempo_rounds, rounds)
            for attack, group in zip(self.attacks, self._groups, strict=True):
                paid = pay(averages, [miner.address for miner in (*self._honest, *group)])
                earned[attack.name][0] += sum(paid[miner.address] for miner in group) / attack.machines
                earned[attack.name][1] += sum(paid[miner.address] for miner in self._honest) / len(self._honest)
        return {name: _ratio(*each) for name, each in earned.items()}

    def _count(self, group: Sequence[Miner]) -> dict[Verdict, int]:
        found: dict[Verdict, int] = {}
        for miner in group:
            for judged in (each for chain in self._judged[miner.address] for each in chain):
                found[judged.verdict] = found.get(judged.verdict, 0) + 1
        return found


def _members(attack: Attack) -> list[Miner]:
    several = attack.strategy is does.split  # they work honestly, each on a slot of its own
    return [
        Miner(f"{attack.name} {number}", ATTACK_SLOT + (number + 1 if several else 0), attack.strategy)
        for number in range(attack.hotkeys)
    ]


def _ratio(theirs: float, ours: float) -> float:
    if ours == 0:
        return float("inf") if theirs else float("nan")
    return theirs / ours
