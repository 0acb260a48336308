-- The microseconds of now, and when tags were last made invalid, 0 for never.
-- KEYS: tags.  ARGV: members.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
-- If it is lost, what was invalid is not known any more, so all that is older is.
redis.call('ZADD', KEYS[1], 'NX', now - 1, 'd')
local found = {string.format('%.0f', now)}
for index, member in ipairs(ARGV) do
  found[index + 1] = string.format('%.0f', redis.call('ZSCORE', KEYS[1], member) or 0)
end
return found
