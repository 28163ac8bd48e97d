"""Services that tell a caller its address and place."""

from __future__ import annotations

import dataclasses
import time
from ipaddress import ip_address
from typing import Any

from lab.outside.service import Reply, Request, Service
from lab.plan import COUNTRIES, Place, place_of


class PlaceService(Service):
    """Looks callers up in the address plan, unless a test told it otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self._overrides: dict[str, dict[str, Any]] = {}

    def place(self, address: str, **fields: Any) -> None:
        """Claim another place for one address; without fields, the plan's again."""
        if fields:
            self._overrides[address] = fields
        else:
            self._overrides.pop(address, None)

    def asked(self, request: Request) -> str:
        """The address that the path names, or the caller's: these services tell of any."""
        for part in request.path.split("/"):
            try:
                return str(ip_address(part))
            except ValueError:
                continue
        return request.client

    def _place(self, address: str) -> Place | None:
        place = place_of(address)
        changes = self._overrides.get(address)
        return dataclasses.replace(place, **changes) if place and changes else place


class IpInfo(PlaceService):
    """ipinfo.io, with its v6 and `lite` siblings."""

    def answer(self, request: Request) -> Reply:
        place = self._place(self.asked(request))
        if request.path.startswith("/lite/"):
            return self._lite(request, place)
        if place is None:
            return Reply(200, {"ip": self.asked(request), "bogon": True})
        return Reply(
            200,
            {
                "ip": self.asked(request),
                "hostname": f"host-{self.asked(request).replace(':', '-').replace('.', '-')}.example.net",
                "city": place.city,
                "region": place.region,
                "country": place.country,
                "loc": f"{place.latitude:.4f},{place.longitude:.4f}",
                "org": f"AS{place.asn} {place.org}",
                "postal": "1000",
                "timezone": place.timezone,
                "readme": "https://ipinfo.io/missingauth",
            },
        )

    def _lite(self, request: Request, place: Place | None) -> Reply:
        if "token" not in request.query and "authorization" not in request.headers:
            return Reply(403, {"status": 403, "error": {"title": "Unknown token"}})
        if place is None:
            return Reply(200, {"ip": self.asked(request), "bogon": True})
        return Reply(
            200,
            {
                "ip": self.asked(request),
                "asn": f"AS{place.asn}",
                "as_name": place.org,
                "as_domain": "example.net",
                "country_code": place.country,
                "country": COUNTRIES.get(place.country, place.country),
                "continent_code": "EU",
                "continent": "Europe",
            },
        )


class IpApi(PlaceService):
    """ip-api.com: 45 requests a minute from one address, and it says how many are left."""

    LIMIT, WINDOW = 45, 60

    def __init__(self) -> None:
        super().__init__()
        self._windows: dict[str, tuple[float, int]] = {}

    def answer(self, request: Request) -> Reply:
        start, used = self._windows.get(request.client, (time.monotonic(), 0))
        if time.monotonic() - start >= self.WINDOW:
            start, used = time.monotonic(), 0
        self._windows[request.client] = (start, used + 1)
        left = max(0, self.LIMIT - used - 1)
        headers = {"X-Rl": str(left), "X-Ttl": str(int(self.WINDOW - (time.monotonic() - start)))}
        if used >= self.LIMIT:
            return Reply(429, b"", headers)
        place = self._place(self.asked(request))
        if place is None:
            return Reply(200, {"status": "fail", "message": "reserved range", "query": self.asked(request)}, headers)
        # This service's spelling of a country's name differs from the others', as in reality.
        name = {"NL": "The Netherlands"}.get(place.country, COUNTRIES.get(place.country, place.country))
        body = {
            "status": "success",
            "country": name,
            "countryCode": place.country,
            "region": place.region_code,
            "regionName": place.region,
            "city": place.city,
            "zip": "",
            "lat": place.latitude,
            "lon": place.longitude,
            "timezone": place.timezone,
            "isp": place.org,
            "org": place.org,
            "as": f"AS{place.asn} {place.org}",
            "query": self.asked(request),
        }
        return Reply(200, body, headers)


class IpWhoIs(PlaceService):
    """ipwho.is."""

    def answer(self, request: Request) -> Reply:
        place = self._place(self.asked(request))
        if place is None:
            return Reply(200, {"ip": self.asked(request), "success": False, "message": "Reserved range"})
        return Reply(
            200,
            {
                "ip": self.asked(request),
                "success": True,
                "type": "IPv6" if ":" in self.asked(request) else "IPv4",
                "country": COUNTRIES.get(place.country, place.country),
                "country_code": place.country,
                "region": place.region,
                "region_code": place.region_code,
                "city": place.city,
                "latitude": place.latitude,
                "longitude": place.longitude,
                "connection": {"asn": place.asn, "org": place.org, "isp": place.org, "domain": "example.net"},
                "timezone": {"id": place.timezone},
            },
        )


class Mullvad(PlaceService):
    """am.i.mullvad.net: knows its own exits."""

    def answer(self, request: Request) -> Reply:
        place = self._place(request.client)
        inside = place is not None and place.asn == 39351
        return Reply(
            200,
            {
                "ip": request.client,
                "country": COUNTRIES.get(place.country, place.country) if place else None,
                "city": place.city if place else None,
                "longitude": place.longitude if place else None,
                "latitude": place.latitude if place else None,
                "mullvad_exit_ip": inside,
                "mullvad_exit_ip_hostname": "nl-ams-wg-001" if inside else None,
                "mullvad_server_type": "WireGuard" if inside else None,
                "blacklisted": {"blacklisted": False, "results": []},
                "organization": place.org if place else None,
            },
        )


class Trace(PlaceService):
    """https://1.1.1.1/cdn-cgi/trace: `loc` is the place of the caller's address."""

    def answer(self, request: Request) -> Reply:
        if request.path != "/cdn-cgi/trace":
            return Reply(404, b"not found", kind="text/plain")
        place = self._place(request.client)
        lines = {
            "fl": "466f12",
            "h": request.host,
            "ip": request.client,
            "ts": f"{time.time():.3f}",
            "visit_scheme": "https" if request.tls else "http",
            "uag": request.headers.get("user-agent", ""),
            "colo": _COLOS.get(place.country, "FRA") if place else "FRA",
            "sliver": "none",
            "http": "http/1.1",
            "loc": place.country if place else "XX",
            "tls": "TLSv1.3" if request.tls else "off",
            "sni": "off",
            "warp": "off",
            "gateway": "off",
            "rbi": "off",
            "kex": "X25519",
        }
        return Reply(200, "".join(f"{key}={value}\n" for key, value in lines.items()), kind="text/plain")


_COLOS = {"CA": "YYZ", "CH": "ZRH", "DE": "MUC", "FI": "HEL", "NL": "AMS", "RO": "OTP", "SE": "ARN", "US": "EWR"}
