-- Claim one key, due or not, whether or not it has records; nothing if somebody has it.
-- ARGV: place, token, microseconds of a lease, name.
local now, key = clock(), ARGV[4]
if is_held(known(key), now) then return false end
local ends = now + ARGV[3]
begin()
local claim = take(key, ARGV[2], now, ends)
redis.call('ZADD', DUE, ends, key)
return claim
