-- The microseconds of now, and when tags were last made invalid, 0 for never.
-- KEYS: tags.  ARGV: members.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local all = redis.call('ZSCORE', KEYS[1], 'd')
if not all then
  -- If it is lost, what was invalid is not known any more, so all that is older is. A Redis that
  -- has no memory for it can be read all the same.
  all = now - 1
  redis.pcall('ZADD', KEYS[1], 'NX', all, 'd')
end
local found = {string.format('%.0f', now)}
for index, member in ipairs(ARGV) do
  local at = member == 'd' and all or redis.call('ZSCORE', KEYS[1], member)
  found[index + 1] = string.format('%.0f', at or 0)
end
return found
