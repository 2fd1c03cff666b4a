"""What lies under a round: one channel to each other member, whichever way its bytes take."""

from abc import ABC, abstractmethod

from hivetrain.averaging.exchange import Exchange


class Channel(ABC):
    """This member's way to one other member during one round.

    Attributes:
        name: which way it is, for the report.
    """

    name: str

    @abstractmethod
    async def exchange(self, stage: int, exchange: Exchange) -> None:
        """Sends the own parts and averages to the member and takes its own; returns when nothing is owed.

        Raises:
            ExchangeError: the member is gone, or did something wrong.
        """

    @abstractmethod
    async def vote(self, ballot: bytes) -> bytes:
        """Tells the member the own ballot and returns its answer.

        Raises:
            ExchangeError: there is none.
        """
