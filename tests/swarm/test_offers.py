"""A leader relays the members' offers; it cannot rewrite one unnoticed."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

from members import make_group, make_offer

from hivetrain.averaging.averager import Averager
from hivetrain.averaging.compression import make_compressor
from hivetrain.averaging.report import Outcome


def attempt(group, offer):
    async def found(*_):
        return group

    async def main():
        averager = Averager(
            None, "run", make_compressor("none", []).codec, matchmaking_time_s=1, part_timeout_s=1, client_mode=False,
            max_samples=lambda _: 100,
        )  # fmt: skip
        averager._p2p = SimpleNamespace(peer_id=group.peer_ids[0])
        averager._matchmaker = SimpleNamespace(find=found)
        begun = []
        report, average = await averager.average(offer, iter(()), 2, 2, 3, 5.0, lambda: begun.append(True))
        return report, average, begun

    return asyncio.run(main())


def test_a_leader_that_changes_our_offer_is_found_out_before_the_exchange():
    group = make_group([make_offer(), make_offer()])
    sent = replace(group.offers[0], samples=1000)
    report, average, begun = attempt(group, sent)
    assert report.outcome is Outcome.DISAGREED
    assert "changed this peer's offer" in report.reason
    assert average is None
    assert not begun


def test_our_own_offer_as_we_sent_it_is_no_objection():
    group = make_group([make_offer(), make_offer()])
    report, _, _ = attempt(group, group.offers[0])
    assert report.outcome is Outcome.BELOW_QUORUM  # the next check: two members, three needed
