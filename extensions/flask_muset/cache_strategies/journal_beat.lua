-- Say that a home is alive.  ARGV: place, microseconds of a lease, home.
local now = clock()
begin()
redis.call('ZADD', HOMES, now + ARGV[2], ARGV[3])
return redis.call('ZREMRANGEBYSCORE', HOMES, '-inf', now)
