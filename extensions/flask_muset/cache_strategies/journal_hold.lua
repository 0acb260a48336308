-- Claim one key, due or not, whether or not it has records; nothing if somebody has it.
-- ARGV: place, token, microseconds of a lease, name.
-- Returns the claim as it is told, and a sequence that no record has or will have.
local now, lease, key = clock(), tonumber(ARGV[3]), ARGV[4]
local state = known(key)
if is_held(state, now) then return false end
begin()
local claim = take(key, state, ARGV[2], now, lease, MOST_BYTES)
redis.call('ZADD', DUE, now + lease, key)
local seq = math.max(now, (redis.call('HGET', COUNTS, 'seq') or 0) + 1)
claim[5] = string.format('%.0f', seq)
redis.call('HSET', COUNTS, 'seq', claim[5])
return claim
