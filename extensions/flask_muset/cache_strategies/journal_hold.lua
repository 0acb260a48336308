-- Claim one key, due or not, whether or not it has records; nothing if somebody has it.
-- ARGV: place, token, microseconds of a lease, name.
-- Returns the claim as it is told, and a sequence that no record has or will have.
local now, key = clock(), ARGV[4]
if is_held(known(key), now) then return false end
local ends = now + ARGV[3]
begin()
local claim = take(key, ARGV[2], now, ends)
redis.call('ZADD', DUE, ends, key)
local seq = math.max(now, (redis.call('HGET', COUNTS, 'seq') or 0) + 1)
claim[5] = string.format('%.0f', seq)
redis.call('HSET', COUNTS, 'seq', claim[5])
return claim
