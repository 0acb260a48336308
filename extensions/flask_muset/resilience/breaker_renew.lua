-- Let a probe keep its place, if it still has it; whether it has.
-- KEYS: breaker.  ARGV: token, milliseconds.
local field = 'probe:' .. ARGV[1]
if redis.call('HEXISTS', KEYS[1], field) == 0 then return 0 end
redis.call('HSET', KEYS[1], field, text(now + ARGV[2]))
return 1
