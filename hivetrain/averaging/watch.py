"""What others may learn of this peer's work while it happens, and the one thing that they may add: a commitment."""

from hivetrain.averaging.report import RoundReport


class RoundWatcher:
    """Follows one peer through its global updates; subclasses override what they need.

    All methods are called on the training thread, which waits for them.
    """

    def on_microbatch(self, samples: int) -> None:
        """A microbatch's gradient, a mean over ``samples`` samples and unscaled, is in ``.grad`` and will be added."""

    def on_skipped(self, samples: int) -> None:
        """A microbatch is left out: its gradient is not finite."""

    def on_commit(self, swarm_epoch: int, params_digest: str, samples: int) -> bytes:
        """An attempt to finish ``swarm_epoch`` is about to begin, with ``samples`` samples of this peer.

        Returns up to 32 bytes that all members of the round will see before the exchange; b"" for nothing.
        """
        return b""

    def on_update(self, report: RoundReport) -> None:
        """The update that ends ``report.swarm_epoch`` was applied."""

    def on_dropped(self) -> None:
        """The gradients gathered so far were thrown away."""


class Watchers(list[RoundWatcher]):
    """Some watchers as one. At most one of them may commit to something."""

    def on_microbatch(self, samples: int) -> None:
        for watcher in self:
            watcher.on_microbatch(samples)

    def on_skipped(self, samples: int) -> None:
        for watcher in self:
            watcher.on_skipped(samples)

    def on_commit(self, swarm_epoch: int, params_digest: str, samples: int) -> bytes:
        commitments = [watcher.on_commit(swarm_epoch, params_digest, samples) for watcher in self]
        given = [commitment for commitment in commitments if commitment]
        assert len(given) <= 1, "only one watcher may commit to something"
        return given[0] if given else b""

    def on_update(self, report: RoundReport) -> None:
        for watcher in self:
            watcher.on_update(report)

    def on_dropped(self) -> None:
        for watcher in self:
            watcher.on_dropped()
