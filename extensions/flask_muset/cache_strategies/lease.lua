-- Give the right to load a key, or say what stands against it.
-- KEYS: value, lock, tags.  ARGV: token, milliseconds, 8 bytes that the caller has seen, where they
-- begin and end in a value, whether a backoff is passed over.
local value = redis.call('GET', KEYS[1])
if value and string.sub(value, ARGV[4], ARGV[5]) ~= ARGV[3] then
  return {'entry', value}
end
local lock = redis.call('GET', KEYS[2])
if lock then
  local kind = string.sub(lock, 1, 1)
  if kind == 'W' then return {'write'} end
  if kind == 'L' and lock ~= 'L' .. ARGV[1] then return {'load'} end
  if kind == 'B' and ARGV[6] == '0' then return {'backoff'} end
end
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
-- See tags.lua.
redis.call('ZADD', KEYS[3], 'NX', now - 1, 'd')
redis.call('SET', KEYS[2], 'L' .. ARGV[1], 'PX', ARGV[2])
return {'lease', string.format('%.0f', now)}
