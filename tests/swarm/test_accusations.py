"""What a member makes of one that gives up, and of whose fault it says that is: only what it has seen itself counts."""

import asyncio
import time

import pytest
import torch
from members import make_group, make_offer

from hivetrain.averaging.codecs import make_codec
from hivetrain.averaging.compression import Plain
from hivetrain.averaging.layout import PART_ELEMENTS, Layout
from hivetrain.averaging.report import Outcome
from hivetrain.averaging.round import FAILED, Round, excuse_for
from hivetrain.averaging.staged import StagedExchange
from hivetrain.averaging.transport import Channel

ME, OTHER, QUITTER = range(3)
PARTS = 8
PART_TIMEOUT_S = 1.0
FOREVER = 10**6


class Script(Channel):
    """A member that takes averages at once and sends its parts of the slice with pauses before them."""

    name = "script"

    def __init__(self, member, pauses_s, then=None):
        self._member, self._pauses_s, self._then = member, pauses_s, then

    async def exchange(self, stage, exchange):
        for index, pause_s in enumerate(self._pauses_s):
            await asyncio.sleep(pause_s)
            exchange.reduction.add(self._member, index, exchange.codec.encode(torch.ones(PART_ELEMENTS)))
        if self._then is not None:
            await self._then()
        await asyncio.Event().wait()

    async def vote(self, ballot):
        return b""


def run_round(other_s, quitter_s, excuse, others_too=False, timeout_s=60.0):
    """A round that one member gives up after it has sent its parts; the pauses are before each member's parts.

    With ``others_too`` the other one gives up as soon as it has sent its own.
    """

    async def run():
        group = make_group([make_offer() for _ in range(3)])
        sizes = [PARTS * PART_ELEMENTS if member == ME else 0 for member in range(3)]
        codec = make_codec("none")
        stages = Plain(codec).stages(torch.ones(sum(sizes)), 0)
        exchange = StagedExchange(ME, [1.0] * 3, lambda n: Layout.split(n, sizes), stages, codec, PART_TIMEOUT_S)
        round_ = Round(group, ME, exchange, vote_timeout_s=1.0)
        told = []

        def give_up(member, said):
            async def tell():
                told.append(time.monotonic())
                answer = asyncio.create_task(round_.answer_ballot(member, said))
                answer.add_done_callback(lambda task: task.exception())

            return tell

        channels = {
            OTHER: Script(OTHER, other_s, give_up(OTHER, FAILED) if others_too else None),
            QUITTER: Script(QUITTER, quitter_s, give_up(QUITTER, excuse)),
        }
        begun = time.monotonic()
        verdict = await round_.run(channels, timeout_s)
        assert verdict.outcome is Outcome.INCOMPLETE
        return verdict, begun + verdict.seconds - told[0] if told else None

    return asyncio.run(run())


def test_a_member_that_others_accuse_and_that_sends_its_next_part_in_time_is_not_blamed():
    verdict, after_s = run_round([0.1] * 3 + [0.5, FOREVER], [0.0] * 3 + [0.4], excuse_for([OTHER]))
    assert verdict.culprits == (), verdict
    assert after_s < PART_TIMEOUT_S


def test_an_honest_slow_member_is_not_blamed_by_a_lie():
    verdict, _ = run_round([0.6] * PARTS, [0.0] * 4 + [2.0], excuse_for([OTHER]))  # a lie well into a slow round
    assert verdict.culprits == (), verdict


def test_a_member_that_others_accuse_is_blamed_once_it_is_late_here_too():
    verdict, after_s = run_round([0.1] * 3 + [FOREVER], [0.0] * 3 + [0.4], excuse_for([OTHER]))
    assert verdict.culprits == (OTHER,), verdict
    assert after_s > 0.5 * PART_TIMEOUT_S


def test_a_member_that_others_accuse_is_not_late_any_more_once_it_gives_up_itself():
    verdict, _ = run_round([0.1] * 3 + [0.6], [0.0] * 3 + [0.4], excuse_for([OTHER]), others_too=True)
    assert verdict.culprits == (), verdict


@pytest.mark.parametrize("excuse", [excuse_for([OTHER]), FAILED], ids=["accuses-another", "says-nothing"])
def test_the_slowest_member_is_not_blamed_for_giving_up_when_another_has_wronged_it(excuse):
    verdict, _ = run_round([0.0] * PARTS, [0.5] * 4, excuse)
    assert verdict.culprits == (), verdict


@pytest.mark.parametrize("excuse", [excuse_for([OTHER]), FAILED], ids=["accuses-another", "says-nothing"])
def test_the_slowest_member_is_blamed_if_it_gives_up_when_time_is_up(excuse):
    verdict, _ = run_round([0.0] * PARTS, [0.5] * 4, excuse, timeout_s=2.8)
    assert verdict.culprits == (QUITTER,), verdict


def test_whom_the_round_waited_for_is_blamed_when_time_is_up_though_it_has_just_sent_something():
    verdict, _ = run_round([0.0] * PARTS, [0.7] * PARTS, FAILED, timeout_s=2.12)
    assert verdict.culprits == (QUITTER,), verdict


def test_who_accuses_this_member_has_a_fault_with_it_and_this_one_shows_the_other_that_it_is_not_late():
    verdict, after_s = run_round([0.0] * 4 + [0.7, FOREVER], [0.0] * 5, excuse_for([ME]))
    assert verdict.culprits == (QUITTER,), verdict
    assert after_s > PART_TIMEOUT_S


def test_an_accused_member_names_who_is_late_besides_who_accuses_it():
    verdict, _ = run_round([0.0] * 4 + [FOREVER], [0.0] * 4, excuse_for([ME]))
    assert verdict.culprits == (OTHER, QUITTER), verdict


def test_an_accused_member_need_not_show_anything_when_all_have_given_up():
    verdict, after_s = run_round([0.0] * 4 + [0.2], [0.0] * 4, excuse_for([ME]), others_too=True)
    assert verdict.culprits == (QUITTER,), verdict
    assert after_s < 0.8 * PART_TIMEOUT_S
