-- Make a tag's entries invalid; the microseconds at which it was done.
-- KEYS: tags.  ARGV: member, channel, sender, microseconds for which tags are remembered, how many.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local all = tonumber(redis.call('ZSCORE', KEYS[1], 'd') or now - 1)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[4])
local excess = redis.call('ZCARD', KEYS[1]) - ARGV[5]
if excess > 0 then
  -- What is forgotten makes all that is older invalid.
  local last = redis.call('ZRANGE', KEYS[1], excess - 1, excess - 1, 'WITHSCORES')[2]
  redis.call('ZREMRANGEBYRANK', KEYS[1], 0, excess - 1)
  all = math.max(all, tonumber(last))
end
redis.call('ZADD', KEYS[1], all, 'd')
redis.call('ZADD', KEYS[1], now, ARGV[1])
local text = string.format('%.0f', now)
redis.call('PUBLISH', ARGV[2], ARGV[3] .. 't' .. text .. ' ' .. ARGV[1])
return text
