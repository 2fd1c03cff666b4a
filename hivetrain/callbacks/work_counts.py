"""What became of a miner's records, counted where it happens."""

from dataclasses import asdict, dataclass


@dataclass
class WorkCounts:
    """Counts of one fit.

    Attributes:
        contributions_published: records that the DHT took; a round that is tried again may have two.
        contributions_dropped: records in the making whose gradients were thrown away.
        publish_failures: records that the DHT did not take in time.
        commits_late: attempts at a round for which the chain's block was not known, so no record was made.
        commits_unpaid: attempts at a round without a commitment, for whatever reason.
        samples_committed: samples in updates that this miner had committed to, which is what validators may pay.
        audits_drawn: contributions that a beacon drew.
        reveals_published: draws that were answered.
        reveals_missed: contributions whose beacon was not known, or whose leaves were not taken, in time.
        chain_outages: times that the chain stopped to answer.
    """

    contributions_published: int = 0
    contributions_dropped: int = 0
    publish_failures: int = 0
    commits_late: int = 0
    commits_unpaid: int = 0
    samples_committed: int = 0
    audits_drawn: int = 0
    reveals_published: int = 0
    reveals_missed: int = 0
    chain_outages: int = 0

    def metrics(self) -> dict[str, float]:
        """By the names under which loggers get them."""
        return {f"chain/{name}": value for name, value in asdict(self).items()}
