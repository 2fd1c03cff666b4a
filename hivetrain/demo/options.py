"""What the user may choose about the demo."""

from dataclasses import dataclass
from pathlib import Path

from hivetrain.contribution.rules import AuditRules


@dataclass(frozen=True)
class Options:
    """The size of the economy.

    Attributes:
        miners: number of miners.
        validators: number of validators; without any, nobody is paid.
        cheats: kinds of dishonest miners (see ``demo.cheats``), one miner each; the last ones cheat.
        audit_probability: share of contributions that are audited.
        swarm_epochs: global updates to make.
        dashboard: show the run in a browser.
        out: directory for summary, plot, reports, logs and the ledger.
        seed: seed of model and data assignment.
        timeout_s: the demo is given up after this many seconds.
    """

    miners: int = 3
    validators: int = 2
    cheats: tuple[str, ...] = ("free-rider",)
    audit_probability: float = 0.25
    swarm_epochs: int = 60
    dashboard: bool = True
    out: Path = Path("out")
    seed: int = 0
    timeout_s: float = 900.0

    @property
    def rules(self) -> AuditRules:
        """Of blocks of one second each, on a machine that does everything at once."""
        return AuditRules(self.audit_probability, beacon_lag=12, reveal_blocks=12)

    @property
    def miner_names(self) -> list[str]:
        return [f"miner-{index}" for index in range(self.miners)]

    @property
    def validator_names(self) -> list[str]:
        return [f"validator-{index}" for index in range(self.validators)]

    def cheat_of(self, miner: str) -> str | None:
        """How a miner cheats; None for an honest one."""
        place = self.miner_names.index(miner) - (self.miners - len(self.cheats))
        return self.cheats[place] if place >= 0 else None
