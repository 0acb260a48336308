-- Count a probe that has succeeded; the last one that is needed closes the breaker. Returns the
-- state if the caller does not know it.
-- KEYS: breaker.  ARGV: ..., token, number of probes.
local stored = read(KEYS[1])
if not stored then return false end
if stored.version ~= ARGV[4] then return told(stored) end
redis.call('HDEL', KEYS[1], 'probe:' .. ARGV[5])
redis.call('HSET', KEYS[1], 'ok:' .. ARGV[5], 1)
local succeeded = 0
for field in pairs(read(KEYS[1])) do
  if string.sub(field, 1, 3) == 'ok:' then succeeded = succeeded + 1 end
end
if succeeded < tonumber(ARGV[6]) then return false end
return change(stored, 'closed', -1, 0, -1)
