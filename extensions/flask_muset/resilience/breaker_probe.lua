-- Give the right to probe, or say what stands against it.
-- KEYS: breaker.  ARGV: ..., token, milliseconds of the lease, number of probes, trips, milliseconds
-- since it opened.
local stored = read(KEYS[1])
if stored and stored.version ~= ARGV[4] then return {'other', told(stored)} end
if not stored or told(stored)[2] ~= 'open' then
  -- What the caller has opened has not come here yet, or Redis has lost it.
  change(stored, 'open', 0, ARGV[8], ARGV[9])
  stored = read(KEYS[1])
end
local left = tonumber(told(stored)[3])
if left > 0 then return {'busy', left} end
-- A caller that has not got the answer asks once more with the same token.
local own, taken, earliest = 'probe:' .. ARGV[5], 0, now + 1000
for field, value in pairs(stored) do
  local is_lease = string.sub(field, 1, 6) == 'probe:' and field ~= own
  if is_lease and tonumber(value) <= now then
    redis.call('HDEL', KEYS[1], field)
  elseif is_lease or string.sub(field, 1, 3) == 'ok:' then
    taken = taken + 1
    if is_lease then earliest = math.min(earliest, value) end
  end
end
if taken >= tonumber(ARGV[7]) then return {'busy', earliest - now} end
redis.call('HSET', KEYS[1], own, text(now + ARGV[6]))
return {'lease', stored.version}
