"""Port 8081: alive, ready, started, and metrics."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ManualClock
from vpn_sentinel.server.api.health import HealthServices, build_health
from vpn_sentinel.server.part_health import PartHealth
from vpn_sentinel.server.request_normalizer import RequestNormalizer
from vpn_sentinel.server.store.store import Store, StoreUnavailable


class Patient:
    """A store whose ping does what a test says."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.fault: Exception | None = None
        self.hang = False
        self.full = False
        self.pings = 0

    async def ping(self) -> None:
        self.pings += 1
        if self.full:
            raise StoreUnavailable("disk_full", "database or disk is full")
        if self.hang:
            await asyncio.Event().wait()
        if self.fault:
            raise self.fault
        await self._store.ping()

    async def read(self, statement):
        if self.fault:
            raise self.fault
        return await self._store.read(statement)


@pytest.fixture
def patient(store: Store) -> Patient:
    return Patient(store)


@pytest.fixture
def services(patient: Patient, clock: ManualClock) -> HealthServices:
    return HealthServices(
        store=patient,  # type: ignore[arg-type]
        clock=clock,
        registry=CollectorRegistry(),
        dispatcher=lambda: PartHealth(ok=True),
    )


@pytest.fixture
async def probe(services: HealthServices) -> AsyncIterator[httpx.AsyncClient]:
    async with client(services) as probing:
        yield probing


def client(services: HealthServices) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(RequestNormalizer(build_health(services)))
    return httpx.AsyncClient(transport=transport, base_url="http://sentinel.test:8081")


async def test_well(probe: httpx.AsyncClient) -> None:
    for path in ("/health", "/health/", "/health/ready", "/health/startup"):
        response = await probe.get(path)
        assert (response.status_code, response.json()["status"]) == (200, "ok"), path
    assert (await probe.get("/health/ready")).json()["parts"] == {"database": {"ok": True}, "dispatcher": {"ok": True}}
    assert (await probe.head("/health")).status_code == 200


async def test_database_away(probe: httpx.AsyncClient, patient: Patient, clock: ManualClock) -> None:
    assert (await probe.get("/health/startup")).status_code == 200
    patient.fault = StoreUnavailable("disk_full", "tcp db.internal:5432 refused")
    clock.now += 2
    response = await probe.get("/health/ready")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    assert response.json() == {
        "status": "failing",
        "parts": {"database": {"ok": False, "detail": "takes nothing: its disk is full"}, "dispatcher": {"ok": True}},
    }
    assert (await probe.get("/health")).status_code == 200, "a restart would not help"
    assert (await probe.get("/health/startup")).status_code == 200, "it did start"


async def test_not_started_until_the_database_answered(
    probe: httpx.AsyncClient, patient: Patient, clock: ManualClock
) -> None:
    patient.fault = StoreUnavailable("disk_full", "refused")
    assert (await probe.get("/health/startup")).status_code == 503
    patient.fault = None
    clock.now += 2
    assert (await probe.get("/health/startup")).status_code == 200


async def test_database_that_hangs(services: HealthServices, patient: Patient) -> None:
    patient.hang = True
    async with client(replace(services, database_timeout_s=0.05)) as probe:
        response = await probe.get("/health/ready")
    assert response.status_code == 503
    assert response.json()["parts"]["database"]["detail"] == "did not answer within 0.05 s"


async def test_dispatcher_stuck(services: HealthServices) -> None:
    async with client(
        replace(services, dispatcher=lambda: PartHealth(False, "no delivery succeeded for 20 min"))
    ) as probe:
        response = await probe.get("/health/ready")
    assert response.status_code == 503
    assert response.json()["parts"]["dispatcher"] == {"ok": False, "detail": "no delivery succeeded for 20 min"}


async def test_a_flood_of_questions_is_one_question(probe: httpx.AsyncClient, patient: Patient) -> None:
    await asyncio.gather(*(probe.get("/health/ready") for _ in range(50)))
    assert patient.pings == 1


async def test_metrics(
    probe: httpx.AsyncClient, services: HealthServices, filled: dict[str, int], clock: ManualClock, patient: Patient
) -> None:
    Counter("vpn_sentinel_test", "With a label from outside.", ["x"], registry=services.registry).labels(
        'a"\\\n}'
    ).inc()
    text = (await probe.get("/metrics")).text
    families = {f.name: f for f in text_string_to_metric_families(text)}
    tunnels = {s.labels["state"]: s.value for s in families["vpn_sentinel_tunnels"].samples}
    assert tunnels == {
        "leaking": 1,
        "down": 1,
        "degraded": 1,
        "silent": 1,
        "unverified": 0,
        "pending": 1,
        "unknown": 0,
        "protected": 2,
    }
    assert families["vpn_sentinel_test"].samples[0].labels == {"x": 'a"\\\n}'}
    assert families["vpn_sentinel_build_info"].samples[0].labels["version"]
    assert "seedbox" not in text
    assert "198.51.100" not in text
    patient.full = True
    assert "vpn_sentinel_database_up 1.0" in (await probe.get("/metrics")).text, "asked a moment ago"
    clock.now += 6
    text = (await probe.get("/metrics")).text
    assert "vpn_sentinel_database_up 0.0" in text
    assert 'vpn_sentinel_tunnels{state="leaking"} 1.0' in text, "reading works: whoever leaks is still to be seen"
    patient.fault = StoreUnavailable("disk_full", "refused")
    clock.now += 6
    text = (await probe.get("/metrics")).text
    assert "vpn_sentinel_database_up 0.0" in text
    assert "vpn_sentinel_tunnels{" not in text


async def test_many_who_scrape_at_once_do_not_hold_up_a_health_check(probe: httpx.AsyncClient) -> None:
    await probe.get("/metrics")
    answered = []

    async def ask(path: str) -> None:
        assert (await probe.get(path)).status_code == 200
        answered.append(path)

    await asyncio.gather(*(ask("/metrics") for _ in range(50)), ask("/health"))
    assert answered.index("/health") < 10
    assert len(answered) == 51


async def test_who_wants_openmetrics_gets_them(probe: httpx.AsyncClient) -> None:
    wants = {"accept": "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"}
    answer = await probe.get("/metrics", headers=wants)
    assert answer.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert answer.text.endswith("# EOF\n")
    assert "# EOF" not in (await probe.get("/metrics")).text


async def test_what_is_not_there(probe: httpx.AsyncClient) -> None:
    assert (await probe.get("/")).status_code == 404
    assert (await probe.get("/health/../metricsx")).status_code == 404
    response = await probe.post("/health")
    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


@pytest.mark.parametrize(
    ("canary", "status"), [(PartHealth(True), 200), (PartHealth(False, "a socket was closed"), 503)]
)
async def test_a_dns_zone_is_a_part_of_it(services: HealthServices, canary: PartHealth, status: int) -> None:
    async with client(replace(services, dns_canary=lambda: canary)) as probing:
        answer = await probing.get("/health/ready")
    assert answer.status_code == status
    assert answer.json()["parts"]["canary"]["ok"] is canary[0]
