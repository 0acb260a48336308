-- Forget the records of a key that coalesce, are not claimed and were accepted before a moment.
-- ARGV: place, name, microseconds of the moment.
local key = ARGV[2]
local entries = redis.pcall('XRANGE', stream(key), '-', '(' .. ARGV[3] .. '-0')
if entries.err or #entries == 0 then return 0 end
local now, state = clock(), known(key)
local ids, removed, bytes = is_held(state, now) and state.ids or '', 0, 0
begin()
for _, entry in ipairs(entries) do
  local record = record_of(entry)
  if record and record.c == '1' and not string.find(ids, ' ' .. record.seq .. ':', 1, true) then
    redis.call('XDEL', stream(key), entry[1])
    redis.call('HDEL', facts(key), 'f' .. record.seq)
    removed, bytes = removed + 1, bytes + #record.d
  end
end
if removed > 0 then
  count(0 - removed, 0 - bytes)
  tidy(key, now)
end
return removed
