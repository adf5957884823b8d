"""Taking entries: each goes to one wait of its group."""

from __future__ import annotations

from typing import ClassVar

from airflow_events import settings
from airflow_events.errors import EventLost, SourceUnfit
from airflow_events.listeners.hub import Hub, Seeker
from airflow_events.listeners.redis.client import BLOCK, LOST, Source, connect, refusals, text
from redis import exceptions
from redis.asyncio import Redis

# What a released claim is held by: its idle time is such that it has lapsed for whoever asks.
_RELEASED = "=released"
_LAPSED = 2**40

# Each script is one step on the server, so that two triggerers which poll for the same wait get one claim.
# None of them makes a consumer for a wait that gets nothing.
_CLAIM = """
if redis.replicate_commands then pcall(redis.replicate_commands) end
local stream, group, wait, lapse = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])
while true do
    local entry = nil
    local held = redis.call('XPENDING', stream, group, '-', '+', 1, wait)
    if #held > 0 then
        entry = held[1][1]
    else
        local lapsed = redis.call('XPENDING', stream, group, 'IDLE', lapse, '-', '+', 1)
        if #lapsed > 0 then
            redis.call('XCLAIM', stream, group, wait, lapse, lapsed[1][1], 'JUSTID')
            entry = lapsed[1][1]
        else
            local groups = redis.call('XINFO', 'GROUPS', stream)
            local last = nil
            for _, fields in ipairs(groups) do
                local about = {}
                for i = 1, #fields, 2 do about[fields[i]] = fields[i + 1] end
                if about['name'] == group then last = about['last-delivered-id'] end
            end
            if #redis.call('XRANGE', stream, '(' .. last, '+', 'COUNT', 1) == 0 then return false end
            local read = redis.call('XREADGROUP', 'GROUP', group, wait, 'COUNT', 1, 'STREAMS', stream, '>')
            if not read then return false end
            return read[1][2][1]
        end
    end
    local there = redis.call('XRANGE', stream, entry, entry)
    if #there > 0 then return there[1] end
    -- Trimmed away while it was claimed: there is nothing to deliver.
    redis.call('XACK', stream, group, entry)
end
"""


_COMMIT = """
if redis.replicate_commands then pcall(redis.replicate_commands) end
local stream, owner = KEYS[1], KEYS[2]
local group, wait, entry, memory = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local who = redis.call('GET', owner)
if who then return who end
local held = redis.call('XPENDING', stream, group, entry, entry, 1)
if #held == 0 then return '' end
if held[1][2] ~= wait then return held[1][2] end
redis.call('SET', owner, wait, 'PX', memory)
redis.call('XACK', stream, group, entry)
if #redis.call('XPENDING', stream, group, '-', '+', 1, wait) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', stream, group, wait)
end
return wait
"""


_RELEASE = f"""
if redis.replicate_commands then pcall(redis.replicate_commands) end
local stream, group, wait = KEYS[1], ARGV[1], ARGV[2]
for _, held in ipairs(redis.call('XPENDING', stream, group, '-', '+', 1000, wait)) do
    redis.call('XCLAIM', stream, group, '{_RELEASED}', 0, held[1], 'IDLE', '{_LAPSED}', 'JUSTID')
end
if #redis.call('XPENDING', stream, group, '-', '+', 1, wait) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', stream, group, wait)
end
return 1
"""


class Consumer(Seeker):
    """A wait for an entry that no other has; ``lapse`` in milliseconds."""

    def __init__(self, wait: str, lapse: int) -> None:
        super().__init__()
        self.wait = wait
        self.lapse = lapse
        self.asked = False


class QueueHub(Hub[Consumer]):
    """Claims entries for the waits of one group."""

    lost: ClassVar[tuple[type[BaseException], ...]] = LOST

    def __init__(self, source: Source, start: str, require_persistence: bool) -> None:
        self._source = source
        self._start = start
        self._require_persistence = require_persistence
        self._client: Redis | None = None
        super().__init__(str(source))

    async def connect(self) -> None:
        self._client = await connect(self._source.conn_id, 1)
        with refusals(self._source):
            if self._require_persistence:
                await _check_persistence(self._client, self._source)
            try:
                await self._client.xgroup_create(
                    self._source.stream, self._source.group, self._start, mkstream=True
                )
            except exceptions.ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    async def disconnect(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def serve(self) -> None:
        client, stream = self._client, self._source.stream
        assert client is not None
        with refusals(self._source):
            newest = await client.xrevrange(stream, count=1)
            last = text(newest[0][0]) if newest else "0"
            there_may_be_more = True
            for seeker in [seeker for seeker in self.seekers if not seeker.done]:
                if not there_may_be_more and seeker.asked:
                    continue
                seeker.asked = True
                entry = await client.eval(_CLAIM, 1, stream, self._source.group, seeker.wait, seeker.lapse)
                if entry:
                    seeker.give((text(entry[0]), _pairs(entry[1])))
                else:
                    there_may_be_more = False
            if not there_may_be_more:
                await client.xread({stream: last}, count=1, block=BLOCK)


def _pairs(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


async def commit(client: Redis, source: Source, wait: str, entry: str) -> None:
    """
    Acknowledge an entry that ``wait`` has claimed.

    :raises EventLost: another wait has it, or had it acknowledged, or somebody else did.
    """
    # The braces keep both keys on one node of a cluster.
    tag = source.stream if "{" in source.stream else f"{{{source.stream}}}"
    owner = f"airflow-events:{tag}:{source.group}:{entry}"
    memory = round(settings.commit_memory() * 1000)
    who = text(await client.eval(_COMMIT, 2, source.stream, owner, source.group, wait, entry, memory))
    if who != wait:
        holder = who or "nobody (it was acknowledged by others, or trimmed)"
        raise EventLost(f"the entry {entry} of {source} is held by {holder}")


async def release(client: Redis, source: Source, wait: str) -> None:
    """Let others have at once what ``wait`` has claimed and not acknowledged."""
    await client.eval(_RELEASE, 1, source.stream, source.group, wait)


async def _check_persistence(client: Redis, source: Source) -> None:
    try:
        on_disk = (await client.info("persistence")).get("aof_enabled")
        on_disk = on_disk or (await client.config_get("save")).get("save")
    except exceptions.AuthenticationError:
        raise
    except exceptions.ResponseError:  # a managed server may not tell
        return
    if not on_disk:
        raise SourceUnfit(
            f"{source}: the server keeps nothing on disk (appendonly is 'no', save is ''), so a restart loses "
            "what no wait has had yet; set appendonly to 'yes', or give require_persistence=False"
        )
