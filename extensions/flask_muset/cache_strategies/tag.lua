-- Make a tag's entries invalid; the microseconds at which it was done.
-- KEYS: tags.  ARGV: member, channel, sender, microseconds for which tags are remembered.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local all = redis.call('ZSCORE', KEYS[1], 'd')
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[4])
redis.call('ZADD', KEYS[1], all or now - 1, 'd')
redis.call('ZADD', KEYS[1], now, ARGV[1])
local text = string.format('%.0f', now)
redis.call('PUBLISH', ARGV[2], ARGV[3] .. 't' .. text .. ' ' .. ARGV[1])
return text
