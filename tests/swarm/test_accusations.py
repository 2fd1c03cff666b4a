"""What a member makes of one that gives up, and of whose fault it says that is: only what it has seen itself counts."""

import asyncio

import pytest
import torch
from members import make_group, make_offer

from hivetrain.averaging.codecs import make_codec
from hivetrain.averaging.compression import Plain
from hivetrain.averaging.layout import PART_ELEMENTS, Layout
from hivetrain.averaging.report import Outcome
from hivetrain.averaging.round import Round, excuse_for
from hivetrain.averaging.staged import StagedExchange
from hivetrain.averaging.transport import Channel

ME, OTHER, QUITTER = range(3)
PARTS = 4
PART_TIMEOUT_S = 4.0


class Script(Channel):
    """A member that sends this one some parts of its slice, and then a ballot that says that it has given up."""

    name = "script"

    def __init__(self, member, parts, pause_s=0.0, give_up=None):
        self._member, self._parts, self._pause_s, self._give_up = member, parts, pause_s, give_up

    async def exchange(self, stage, exchange):
        for index in range(self._parts):
            await asyncio.sleep(self._pause_s)
            exchange.reduction.add(self._member, index, exchange.codec.encode(torch.ones(PART_ELEMENTS)))
        if self._give_up is not None:
            await self._give_up()
        await asyncio.Event().wait()

    async def vote(self, ballot):
        return b""


async def run_round(excuse, pause_s):
    group = make_group([make_offer() for _ in range(3)])
    sizes = [PARTS * PART_ELEMENTS if member == ME else 0 for member in range(3)]
    codec = make_codec("none")
    stages = Plain(codec).stages(torch.ones(sum(sizes)), 0)
    exchange = StagedExchange(ME, [1.0] * 3, lambda n: Layout.split(n, sizes), stages, codec, PART_TIMEOUT_S)
    round_ = Round(group, ME, exchange, vote_timeout_s=1.0)

    async def give_up():
        answer = asyncio.create_task(round_.answer_ballot(QUITTER, excuse))
        answer.add_done_callback(lambda task: task.exception())

    channels = {OTHER: Script(OTHER, PARTS - 1), QUITTER: Script(QUITTER, PARTS - 2, pause_s, give_up)}
    return await round_.run(channels, 20.0)


@pytest.mark.parametrize("excuse", [excuse_for([OTHER]), excuse_for([])], ids=["accuses-another", "says-nothing"])
def test_a_slow_member_that_gives_up_first_is_at_fault_itself(excuse):
    verdict = asyncio.run(run_round(excuse, pause_s=0.5))
    assert verdict.outcome is Outcome.INCOMPLETE
    assert verdict.culprits == (QUITTER,), verdict


@pytest.mark.parametrize("excuse", [excuse_for([OTHER]), excuse_for([])], ids=["accuses-another", "says-nothing"])
def test_a_member_that_gives_up_in_time_makes_nobody_guilty(excuse):
    verdict = asyncio.run(run_round(excuse, pause_s=0.0))
    assert verdict.outcome is Outcome.INCOMPLETE
    assert verdict.culprits == (), verdict


def test_who_accuses_this_member_has_a_fault_with_it():
    verdict = asyncio.run(run_round(excuse_for([ME]), pause_s=0.0))
    assert verdict.culprits == (QUITTER,), verdict
