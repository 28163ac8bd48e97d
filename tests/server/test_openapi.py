"""Whatever the OpenAPI document allows to be asked, and what it does not, is answered as it says: never with a 5xx."""

import asyncio
import itertools
from typing import Any

import httpx
import hypothesis
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from tests.server.test_doors import KEYS, Running, collector, server

__all__ = ["collector", "server"]
MODES = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
]
ENDLESS = "/api/v1/events"


async def test_every_answer_is_as_documented(server: Running) -> None:
    base = f"http://127.0.0.1:{server.ports['api']}"
    async with httpx.AsyncClient() as client:
        document = (await client.get(f"{base}/api/v1/schema/openapi.json")).json()
    schema = schemathesis.openapi.from_dict(document)
    asked = set()
    for operation in (found.ok() for found in schema.get_all_operations()):  # type: ignore[union-attr] # an Err raises
        if operation.path != ENDLESS:
            takes = operation.definition.raw.keys() & {"parameters", "requestBody"}
            for mode in MODES if takes else MODES[:1]:  # where nothing can be said, nothing can be said wrongly
                await asyncio.to_thread(tried, operation, mode, base, server.keys[KEYS[2]] or "")
            asked.add(operation.path)
    assert asked | {ENDLESS} == set(document["paths"])


def tried(operation: Any, mode: Any, base: str, key: str) -> None:
    asked = itertools.count(1)

    @hypothesis.seed(1)
    @hypothesis.settings(
        max_examples=15, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        n = next(asked)
        case.call_and_validate(
            base_url=base, checks=CHECKS, headers={"X-API-Key": key, "X-Forwarded-For": f"20.1.{n >> 8}.{n & 255}"}
        )

    run()
