-- Give the right to probe, or say what stands against it: others probe, or it has another state.
-- KEYS: breaker.  ARGV: ..., token, milliseconds of the lease, number of probes, trips, milliseconds
-- since it opened, milliseconds of the longest lease.
local stored = read(KEYS[1])
if stored and stored.version ~= ARGV[4] then return {'other', told(stored)} end
if not stored or told(stored)[2] ~= 'open' then
  -- What the caller has opened has not come here yet, or Redis has lost it.
  change(stored, 'open', 0, ARGV[8], ARGV[9])
  stored = read(KEYS[1])
end
local left = tonumber(told(stored)[3])
if left > 0 then return {'busy', left} end
local taken, ok, earliest = 0, 0, now + 1000
for field, value in pairs(stored) do
  local is_lease = string.sub(field, 1, 6) == 'probe:'
  -- One that ends later than any is of before the clock was set back.
  if is_lease and (tonumber(value) <= now or value - now > tonumber(ARGV[10])) then
    redis.call('HDEL', KEYS[1], field)
  elseif is_lease then
    taken, earliest = taken + 1, math.min(earliest, value)
  elseif string.sub(field, 1, 3) == 'ok:' then
    ok = ok + 1
  end
end
local permitted = tonumber(ARGV[7])
-- Those that have succeeded may have been permitted more of them.
if ok >= permitted then return {'other', change(stored, 'closed', -1, 0, -1)} end
if taken + ok >= permitted then return {'busy', earliest - now} end
redis.call('HSET', KEYS[1], 'probe:' .. ARGV[5], text(now + ARGV[6]))
return {'lease', stored.version}
