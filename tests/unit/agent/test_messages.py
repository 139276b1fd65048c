"""What agents tell one another arrives as it was said."""

import pytest

from everstep.agent.members import ClaimAnswer
from everstep.agent.messages import answer_message, parsed_answer
from everstep.agent.view import Entry, View
from everstep.proto import peer_pb2 as wire


@pytest.mark.parametrize("joined", [True, False])
def test_an_answer_to_a_claim_travels_whole(joined: bool) -> None:
    view = View([Entry("n1", 1, "boot", address="n1:1")])
    answer = ClaimAnswer(view, "held", "n2", joined=joined)
    sent = answer_message(answer).SerializeToString()
    assert parsed_answer(wire.ClaimReply.FromString(sent)) == answer
