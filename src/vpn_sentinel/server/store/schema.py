"""The tables. Times are seconds since the epoch, as floats; JSON is text, written and read by `wire.codec`."""

from sqlalchemy import BigInteger, Column, Float, ForeignKey, Index, Integer, MetaData, Table, Text, text

# SQLite numbers rows automatically only for INTEGER PRIMARY KEY.
_Id = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# Facts of the installation, one a row: its secret, its identity, when it was last alive.
meta = Table(
    "meta",
    metadata,
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

# Credentials that may report. Only `digest` (BLAKE2b of the token, hex) is kept; `prefix` finds the row.
tokens = Table(
    "tokens",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", Text, nullable=False),
    Column("shared", Integer, nullable=False),  # 1: may report under any name; 0: only as the tunnel `name`
    Column("prefix", Text, nullable=False, unique=True),
    Column("digest", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
)

# The present state of a watched tunnel. `memory` is the state machine's (JSON of domain.machine.Memory, with `seen_at`
# in a column of its own); state, since, findings and the columns after `last_seen` are what the pages show. `deadline`
# is when silence begins.
tunnels = Table(
    "tunnels",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
    Column("state", Text, nullable=False),
    Column("since", Float, nullable=False),
    Column("findings", Text, nullable=False),  # JSON: [{code, message, evidence}]
    Column("memory", Text, nullable=False),
    Column("seen_at", Float, nullable=False),  # of the memory; apart, because often nothing else changes
    Column("source", Text, nullable=False),  # "agent" or "keepalive"
    Column("version", Text, nullable=False),
    Column("interval", Float, nullable=False),
    Column("last_seen", Float, nullable=False),
    Column("deadline", Float),
    Column("spool", Text, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("exit4", Text),
    Column("exit6", Text),
    Column("place", Text, nullable=False),  # JSON: {country, region, city, timezone, org, asn, source}
    Column("resolvers", Text, nullable=False),  # JSON: [{ip, country, org}]
    Column("dns_loc", Text, nullable=False),
    Column("dns_colo", Text, nullable=False),
    Column("role", Text, nullable=False, server_default="tunnel"),  # or "reference"
    Column("site", Text, nullable=False, server_default=""),
    Column("policy", Text, nullable=False, server_default=""),  # JSON of what the agent declared last
    Column("port", Integer),  # the forwarded one
    Column("port_check", Text, nullable=False, server_default=""),  # JSON: {address, port, answer, at}
)
Index("ix_tunnels_deadline", tunnels.c.deadline)
Index("ix_tunnels_site", tunnels.c.site)

observations = Table(
    "observations",
    metadata,
    Column("tunnel_id", _Id, ForeignKey("tunnels.id", ondelete="CASCADE"), primary_key=True),
    Column("spool", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("at", Float, nullable=False),
    Column("received_at", Float, nullable=False),
    Column("state", Text, nullable=False),  # of the verdict, which may be "unknown"
    Column("body", Text, nullable=False),  # JSON of domain.observation.Observation
    sqlite_with_rowid=False,  # rows are read by this key alone: a second B-tree by rowid would only cost writes
)
Index("ix_observations_received_at", observations.c.received_at)

# Changes of a tunnel's state, one a row, with the time at which the cause began.
transitions = Table(
    "transitions",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("tunnel_id", _Id, ForeignKey("tunnels.id", ondelete="CASCADE"), nullable=False),
    Column("at", Float, nullable=False),
    Column("decided_at", Float, nullable=False),
    Column("old", Text, nullable=False),
    Column("new", Text, nullable=False),
    Column("findings", Text, nullable=False),
)
Index("ix_transitions_tunnel_id_at", transitions.c.tunnel_id, transitions.c.at)

# A time in which a tunnel was not protected. At most one incident of a tunnel is open.
incidents = Table(
    "incidents",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("tunnel_id", _Id, ForeignKey("tunnels.id", ondelete="CASCADE"), nullable=False),
    Column("opened_at", Float, nullable=False),
    Column("closed_at", Float),
    Column("worst", Text, nullable=False),
    Column("findings", Text, nullable=False),
)
Index("ix_incidents_tunnel_id_opened_at", incidents.c.tunnel_id, incidents.c.opened_at)
Index(
    "uq_incidents_open",
    incidents.c.tunnel_id,
    unique=True,
    sqlite_where=incidents.c.closed_at.is_(None),
    postgresql_where=incidents.c.closed_at.is_(None),
)

# What agents did for their tunnels: containment, its release, remedies.
actions = Table(
    "actions",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("tunnel_id", _Id, ForeignKey("tunnels.id", ondelete="CASCADE"), nullable=False),
    Column("at", Float, nullable=False),
    Column("name", Text, nullable=False),
    Column("outcome", Text, nullable=False),  # domain.observation.Outcome
    Column("detail", Text, nullable=False),
)
Index("ix_actions_tunnel_id_at", actions.c.tunnel_id, actions.c.at)

# One notice for one channel. It is due when `due_at` and `leased_until` have passed, and settled once, with `outcome`.
outbox = Table(
    "outbox",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("channel", Text, nullable=False),
    Column("tunnel", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("body", Text, nullable=False),  # JSON of domain.notice.Notice
    Column("created_at", Float, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("leased_until", Float, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("settled_at", Float),
    Column("outcome", Text),  # "done", "given_up", "superseded" or "summed" (contained in a later one)
)
Index(
    "ix_outbox_due",
    outbox.c.due_at,
    sqlite_where=outbox.c.settled_at.is_(None),
    postgresql_where=outbox.c.settled_at.is_(None),
)
# When and how often a channel recently delivered a notice of a tunnel.
_DELIVERED = outbox.c.outcome == text("'done'")
Index(
    "ix_outbox_told",
    outbox.c.channel,
    outbox.c.tunnel,
    outbox.c.settled_at,
    sqlite_where=_DELIVERED,
    postgresql_where=_DELIVERED,
)

# Every attempt to deliver, with its result: "done", "transient" or "permanent", and the reason of a failure.
attempts = Table(
    "attempts",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("delivery_id", _Id, ForeignKey("outbox.id", ondelete="CASCADE"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("at", Float, nullable=False),
    Column("result", Text, nullable=False),
    Column("reason", Text, nullable=False),
)
Index("ix_attempts_delivery_id", attempts.c.delivery_id)
