"""One look for `check`: what programs are seen to do while it listens is looked into as well."""

from dataclasses import replace
from ipaddress import ip_address

from tests.agent.doubles import udp
from tests.agent.rounds.test_round import deps
from tests.agent.test_dns import NOWHERE, whoami
from vpn_sentinel.agent.once import with_neighbors
from vpn_sentinel.agent.probes.dns import Nameserver
from vpn_sentinel.domain.observation import Answer, Observation, ResolverSighting, Trigger

THERE = ip_address("127.0.0.2")
SEEN = Observation(trigger=Trigger.START)


async def test_a_nameserver_that_is_asked_while_check_listens_is_asked_where_it_comes_out() -> None:
    async with udp(whoami, host="127.0.0.2") as (port, there):
        looking = replace(deps(9), neighbors=lambda: (Nameserver(THERE, port=port),))
        seen = await with_neighbors(SEEN, looking, NOWHERE)
        assert {str(s.egress) for s in seen.resolvers if s.nameserver == THERE} == {"185.65.200.7"}
        known = replace(SEEN, resolvers=(ResolverSighting(method="google", nameserver=THERE, answer=Answer.ANSWERED),))
        before = len(there.got)
        assert await with_neighbors(known, looking, NOWHERE) is known
        assert len(there.got) == before


async def test_what_does_not_answer_is_none() -> None:
    looking = replace(deps(9), neighbors=lambda: (Nameserver(THERE, port=9),))
    assert (await with_neighbors(SEEN, looking, NOWHERE)).resolvers == ()
