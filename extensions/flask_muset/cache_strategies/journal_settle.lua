-- End a claim; 1 if it was still held.
-- ARGV: place, name, token, the last sequence that is done with; where one has failed its sequence,
-- the error, whether that is final, microseconds of a pause, whether it counts as an attempt.
local now, key = clock(), ARGV[2]
local state = known(key)
if state.token ~= ARGV[3] or not is_held(state, now) then return 0 end
begin()
local gone, names, bytes, due = {}, {'token', 'ends', 'ids'}, 0, now
local function remove(seq, size)
  gone[#gone + 1] = seq .. '-0'
  bytes = bytes + size
  if state['f' .. seq] then names[#names + 1] = 'f' .. seq end
end

for seq, size in string.gmatch(state.ids or '', ' (%d+):(%d+)') do
  if tonumber(seq) <= tonumber(ARGV[4]) then remove(seq, size) end
end
local seq = ARGV[5]
local is_its_own = seq and string.find(state.ids or '', ' ' .. seq .. ':', 1, true)
local entry = is_its_own and redis.call('XRANGE', stream(key), seq .. '-0', seq .. '-0')[1]
if entry then
  local attempts, first = string.match(state['f' .. seq] or '', '^(%d+) (%d+) ')
  attempts = (attempts or 0) + ARGV[9]
  first = first or string.format('%.0f', now)
  if ARGV[7] == '1' then
    local record = record_of(entry)
    redis.call('XADD', DEAD, '*', 'k', key, 'q', seq, 'w', record.w, 'c', record.c or '0', 'h',
      record.h or '', 'd', record.d, 'n', attempts, 'f', first, 'l', now, 'e', ARGV[6])
    redis.call('HINCRBY', facts(key), 'dead', 1)
    remove(seq, #record.d)
  else
    redis.call('HSET', facts(key), 'f' .. seq, attempts .. ' ' .. first .. ' ' .. ARGV[6])
    due = now + ARGV[8]
  end
end
redis.call('HDEL', facts(key), unpack(names))
if #gone > 0 then
  -- Those that are there: others may have taken some away.
  local removed = redis.call('XDEL', stream(key), unpack(gone))
  if removed > 0 then count(0 - removed, 0 - bytes) end
end
if tidy(key, now) then redis.call('ZADD', DUE, due, key) end
return 1
