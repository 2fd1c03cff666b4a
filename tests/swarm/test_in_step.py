"""What a link sends first."""

import torch

from hivetrain.averaging.codecs import make_codec
from hivetrain.averaging.direct.frames import Kind
from hivetrain.averaging.direct.session import Session
from hivetrain.averaging.layout import Layout
from hivetrain.averaging.reduction import Reduction
from hivetrain.averaging.rules import RULES

PARTS, ELEMENTS = 8, 4096


def test_who_is_behind_with_its_parts_sends_parts_and_averages_in_step():
    numel = 2 * PARTS * ELEMENTS
    layout = Layout.split(numel, (PARTS * ELEMENTS,) * 2, (ELEMENTS,) * 2)
    vector, codec = torch.ones(numel), make_codec("none")
    reduction = Reduction(0, (1.0, 1.0), layout, vector, codec, RULES["mean"], torch.empty(numel))
    session = Session(b"g" * 32, 0, 1, reduction, lambda: None)
    for index in range(PARTS):  # the other end has sent all its parts before this one has sent any
        reduction.add(1, index, bytes(4 * ELEMENTS))
    kinds = []
    for _ in range(2 * PARTS):
        header, payload = session.next_frame()
        assert len(payload()) == header.length
        session.sent(header)
        kinds.append(header.kind)
    for sent in range(1, len(kinds) + 1):
        parts, averages = kinds[:sent].count(Kind.PART), kinds[:sent].count(Kind.AVERAGE)
        assert parts == PARTS or 0 <= parts - averages <= 4, kinds
    assert kinds.count(Kind.PART) == kinds.count(Kind.AVERAGE) == PARTS
