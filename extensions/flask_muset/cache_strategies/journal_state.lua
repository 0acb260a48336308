-- How much there is.  ARGV: place.
-- Returns the records, their bytes, when the oldest was accepted or nothing, the dead letters, and the
-- microseconds of now.
local counts = redis.call('HMGET', COUNTS, 'pending', 'bytes')
local oldest = redis.call('ZRANGE', AGE, 0, 0, 'WITHSCORES')[2]
-- Keys that nobody has claimed yet have no age; of these the ones that are due first are the oldest.
for _, key in ipairs(redis.call('ZRANGE', DUE, 0, 19)) do
  local first = redis.pcall('XRANGE', stream(key), '-', '+', 'COUNT', 1)[1]
  local since = first and tonumber(named(first[2]).a or string.match(first[1], '^%d+'))
  if since and (not oldest or since < tonumber(oldest)) then
    oldest = string.format('%.0f', since)
  end
end
return {counts[1] or '0', counts[2] or '0', oldest or '', redis.call('XLEN', DEAD),
  string.format('%.0f', clock())}
